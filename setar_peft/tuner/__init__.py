"""The PEFT plugin. Importing the package registers the method SETAR with PEFT."""

# First of all: with PEFT the method is registered, which imports the modules of this folder.
import peft  # noqa: F401
