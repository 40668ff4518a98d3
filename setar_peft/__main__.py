"""The command `setar` as a module, for launchers: `accelerate launch -m setar_peft search ...`."""

from setar_peft.cli import app

app(prog_name="setar")
