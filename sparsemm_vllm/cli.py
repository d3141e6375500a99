"""The `sparsemm` command."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sparsemm_vllm.environment import has_gpu
from sparsemm_vllm.serve import exec_serve

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serve multimodal models with per-head KV cache budgets on stock vLLM.",
)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(context: typer.Context) -> None:
    """Run `vllm serve` with these arguments, on the CPU where there is no GPU."""
    if not has_gpu():
        Console(stderr=True).print(
            "[dim]sparsemm: no GPU found, serving on the CPU: for trials, some tokens a second[/]"
        )
    exec_serve(context.args)


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the picture, the report and the server's log.")
    ] = Path("sparsemm-demo"),
    seed: Annotated[
        int | None, typer.Option(help="Of the picture; a new one each time if not given.")
    ] = None,
    budget: Annotated[
        int, typer.Option(help="Tokens per KV head on average, window included.", min=2)
    ] = 64,
) -> None:
    """Let the bundled model read a new picture from a pruned KV cache, and show what was kept."""
    from sparsemm_vllm.demo import run_demo

    raise typer.Exit(run_demo(out, seed, budget))


def main() -> None:
    """Entry point of the console command."""
    app()


if __name__ == "__main__":
    main()
