"""The command `setar`: one file a command, with its options and what it does, imported when it is used."""

from __future__ import annotations

import ast
import importlib
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

_COMMANDS = ("demo", "search", "evaluate", "fit", "detect", "merge", "export-lora", "export-onnx", "info")


class _Unloaded(typer.core.TyperCommand):
    """A command before it is used: its name, and the first line of its file for the list of commands."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Import the command's file, and go on with the command in it."""
        name = str(self.name)
        alone = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)
        module = importlib.import_module(f"setar_peft.cli.{_module_name(name)}")
        alone.command(name)(getattr(module, _module_name(name)))
        return typer.main.get_command(alone).make_context(*args, **kwargs)


class _Commands(typer.core.TyperGroup):
    """Ends with one sentence on standard error and exit code 1 where the package or the system refuses something."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _COMMANDS:
            return None
        source = Path(__file__).with_name(f"{_module_name(cmd_name)}.py").read_text(encoding="utf-8")
        described = (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
        return _Unloaded(cmd_name, help=described, rich_markup_mode="markdown")

    def invoke(self, ctx: Any) -> Any:
        plain = warnings.formatwarning
        # What is said, and not where in the code.
        warnings.formatwarning = lambda message, *_, **__: f"Warning: {message}\n"
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # whoever reads has seen enough, as in `setar detect ... | head`
            raise
        except (ValueError, OSError) as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error
        finally:
            warnings.formatwarning = plain


def _module_name(command: str) -> str:
    return command.replace("-", "_")


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from setar_peft import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """SeTAR: out-of-distribution detection by selective low-rank approximation, as a PEFT tuner."""
