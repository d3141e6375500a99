"""The `sparsemm` command."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sparsemm_vllm.commands.serve import exec_serve
from sparsemm_vllm.environment import has_gpu
from sparsemm_vllm.errors import UserError

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
    with _one_line_errors("demo"):
        from sparsemm_vllm.commands.demo.command import run_demo

        code = run_demo(out, seed, budget)
    raise typer.Exit(code)


@contextmanager
def _one_line_errors(command: str) -> Iterator[None]:
    """Print an error that the user can mend as one line on the standard error; exit status 2."""
    try:
        yield
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except UserError as error:
        message = str(error)
    else:
        return
    print(f"sparsemm {command}: {message}", file=sys.stderr)
    raise typer.Exit(2)


Model = Annotated[
    str, typer.Argument(help="Name or folder; vLLM's options may follow, as `vllm serve` has.")
]
ProfileName = Annotated[
    str, typer.Argument(metavar="PROFILE", help="A head profile: a file, or a bundled name.")
]
Budget = Annotated[int, typer.Option(help="Tokens per KV head on average, window included.")]
Method = Annotated[
    str,
    typer.Option(help="sparsemm, full, snapkv, pyramidkv, adakv, random or random_heads."),
]
Redistribute = Annotated[
    bool, typer.Option("--redistribute", help="Give what heads cannot use to the others.")
]
Window = Annotated[int, typer.Option(help="Last prompt tokens that every head keeps.")]
Rho = Annotated[float, typer.Option(help="Share of the budget that is spread evenly.")]
PromptTokens = Annotated[int, typer.Option(help="Length of the prompt, pictures included.")]


@app.command("import-scores")
def import_scores(
    file: Annotated[Path, typer.Argument(help='JSON: {"layer-head": [score, ...], ...}.')],
    model_id: Annotated[str, typer.Option(help="The model that the scores were measured on.")],
    out: Annotated[Path, typer.Option(help="The profile to write.")],
    kv_heads: Annotated[
        int | None, typer.Option(help="KV heads of a layer; as many as query heads if not given.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace a profile that exists.")] = False,
) -> None:
    """Make a head profile of scores in the format that SparseMM's authors publish."""
    with _one_line_errors("import-scores"):
        from sparsemm_vllm.budget import profile
        from sparsemm_vllm.commands import import_scores

        imported = import_scores.import_scores(file, model_id, kv_heads)
        if out.is_dir():
            raise profile.ProfileError(f"{out} is a folder; name the file to write")
        if out.exists() and not force:
            raise profile.ProfileError(f"{out} exists; --force replaces it")
        profile.save_profile(imported, out)
    Console().print(
        f"saved {out}: {imported.num_layers} layers, {imported.num_query_heads} query heads, "
        f"{imported.num_kv_heads} KV heads",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def profile(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option(help="The profile to write.")],
    samples: Annotated[int, typer.Option(help="Pictures to ask about.", min=1)] = 400,
    data: Annotated[
        str,
        typer.Option(
            metavar="ocr|PATH",
            help="Drawn pictures of text, or files of synthdog-en-detection or COCO detection.",
        ),
    ] = "ocr",
    mode: Annotated[
        str,
        typer.Option(
            metavar="forced|free|causal",
            help="Score the true answers in one prefill each, let the model answer, or measure "
            "what each KV head is worth, one prefill a head.",
        ),
    ] = "forced",
    seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted run.")] = False,
    force: Annotated[bool, typer.Option(help="Replace a profile that exists.")] = False,
) -> None:
    """Measure which heads of a model look at what it reads: a head profile."""
    with _one_line_errors("profile"):
        from sparsemm_vllm.commands.profile import run_profile

        code = run_profile(
            model, out, samples, data, mode, seed, resume, force, context.args, Console()
        )
    raise typer.Exit(code)


@app.command()
def plan(
    profile: ProfileName,
    prompt_tokens: PromptTokens,
    budget: Budget = 256,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of the answer so far.")] = 0,
    kv_memory: Annotated[
        float | None,
        typer.Option(metavar="GB", help="Size of the whole KV cache; 1 GB is 10^9 bytes."),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens in a KV block.")] = 16,
    head_size: Annotated[
        int | None, typer.Option(help="Size of a head; 128 is assumed if not given.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the cache: bfloat16, float16, float32 or fp8.")
    ] = "bfloat16",
    window: Window = 32,
    rho: Rho = 0.1,
    method: Method = "sparsemm",
    redistribute: Redistribute = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Say how much KV cache a request will hold, and how many requests fit."""
    with _one_line_errors("plan"):
        from sparsemm_vllm.budget import plan
        from sparsemm_vllm.budget.profile import load_profile
        from sparsemm_vllm.budget.settings import Settings
        from sparsemm_vllm.commands.plan import print_plan

        settings = Settings.from_values(
            {
                "budget": budget,
                "window": window,
                "rho": rho,
                "method": method,
                "redistribute": redistribute,
            }
        )
        made = plan.make_plan(
            load_profile(profile),
            settings,
            prompt_tokens,
            answer_tokens=answer_tokens,
            kv_memory=kv_memory,
            block_size=block_size,
            head_size=plan.HEAD_SIZE if head_size is None else head_size,
            dtype=dtype,
        )
    if as_json:
        print(json.dumps(asdict(made), indent=2))
    else:
        print_plan(made, Console(), assumed_head_size=head_size is None)


@app.command()
def show(
    profile: ProfileName,
    out: Annotated[Path | None, typer.Option(help="Save a picture too: FILE.png.")] = None,
    budget: Budget = 256,
    prompt_tokens: PromptTokens = 3072,
    method: Method = "sparsemm",
    redistribute: Redistribute = False,
) -> None:
    """Show a head profile: its scores, how concentrated they are, and each head's budget."""
    with _one_line_errors("show"):
        from sparsemm_vllm.budget.profile import load_profile
        from sparsemm_vllm.budget.settings import Settings
        from sparsemm_vllm.commands import show

        loaded = load_profile(profile)
        settings = Settings.from_values(
            {"budget": budget, "method": method, "redistribute": redistribute}
        )
        if out is not None:
            show.draw_profile(loaded, settings, prompt_tokens, out)
        show.print_profile(loaded, settings, prompt_tokens, Console())
    if out is not None:
        Console().print(f"\nsaved {out}", highlight=False, markup=False, soft_wrap=True)


@app.command("eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def evaluate(
    context: typer.Context,
    model: Model,
    methods: Annotated[
        str, typer.Option(help="Separated by commas; the dense cache is always measured.")
    ] = "sparsemm,snapkv",
    budgets: Annotated[
        str, typer.Option(help="Tokens per KV head on average, separated by commas.")
    ] = "64,128,256",
    redistribute: Annotated[
        bool, typer.Option("--redistribute", help="Measure redistributed budgets too.")
    ] = False,
    tasks: Annotated[
        str, typer.Option(help="ocr (read all the text), qa (about one line), or both.")
    ] = "ocr,qa",
    samples: Annotated[int, typer.Option(help="Pictures a task.")] = 300,
    data: Annotated[
        str,
        typer.Option(
            metavar="drawn|PATH",
            help="Held-out pictures that are drawn, or a file of questions: see the README.",
        ),
    ] = "drawn",
    seed: Annotated[
        int, typer.Option(help="Of the choice of samples; the first of the drawn ones.")
    ] = 1000,
    profile: Annotated[
        str | None, typer.Option(help="A head profile: a file, or a bundled name.")
    ] = None,
    window: Window = 32,
    rho: Rho = 0.1,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 128,
    mask_heads: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Silence this share of the query heads, such as 5%."),
    ] = None,
    mask: Annotated[
        str, typer.Option(help="Which ones: visual, random, or both.")
    ] = "visual,random",
    draws: Annotated[int, typer.Option(help="Of random heads.")] = 3,
    out: Annotated[
        Path, typer.Option(help="Folder for results; a second call goes on from there.")
    ] = Path("sparsemm-eval"),
) -> None:
    """Measure what a model still reads under each method and budget, in the real engine."""
    with _one_line_errors("eval"):
        from sparsemm_vllm.budget.settings import Settings
        from sparsemm_vllm.commands.evaluate import command
        from sparsemm_vllm.commands.evaluate.points import Comparison
        from sparsemm_vllm.commands.evaluate.questions import Choice

        asked = command.Evaluation(
            model=model,
            profile=profile,
            settings=Settings.from_values({"window": window, "rho": rho}),
            comparison=Comparison(
                methods=command.split_words(methods),
                budgets=command.split_numbers(budgets, "--budgets"),
                redistribute=redistribute,
                mask_share=mask_heads,
                masks=command.split_words(mask),
                draws=draws,
            ),
            choice=Choice(source=data, tasks=command.split_words(tasks), count=samples, seed=seed),
            max_tokens=max_tokens,
            out=out,
            engine_arguments=context.args,
        )
        code = command.run_eval(asked, Console())
    raise typer.Exit(code)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def look(
    context: typer.Context,
    model: Model,
    image: Annotated[Path, typer.Argument(help="The picture.")],
    question: Annotated[str, typer.Option(help="Asked about it.")] = "Read the text.",
    out: Annotated[Path, typer.Option(help="The picture to save: FILE.png.")] = Path("look.png"),
    profile: Annotated[
        str, typer.Option(help="A head profile: a file, a bundled name, or auto.")
    ] = "auto",
    budget: Budget = 256,
    window: Window = 32,
    max_tokens: Annotated[int, typer.Option(help="Of the answer.", min=1)] = 128,
) -> None:
    """Ask about a picture, and show where visual heads looked and what the pruned cache kept."""
    with _one_line_errors("look"):
        from sparsemm_vllm.budget.settings import Settings
        from sparsemm_vllm.commands.look.command import run_look

        settings = Settings.from_values({"profile": profile, "budget": budget, "window": window})
        run_look(model, image, question, out, settings, max_tokens, context.args, Console())


@app.command()
def check(
    everything: Annotated[
        bool, typer.Option("--all", help="List what is as expected too.")
    ] = False,
    run: Annotated[
        bool, typer.Option("--run", help="Serve a small model too, and compare its answers.")
    ] = False,
    result: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="With --run: write what it found."),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the signatures of the installed vLLM instead."),
    ] = None,
) -> None:
    """Compare the installed vLLM with the release that was tested; status 1 if it differs."""
    from sparsemm_vllm.environment import quieten_vllm, use_cpu

    if result is not None and not run:
        raise typer.BadParameter("goes with --run", param_hint="--json")
    quieten_vllm()
    if not has_gpu():
        use_cpu()
    console = Console()

    def list_differences() -> int:
        from sparsemm_vllm.commands.check import differences as canary

        return canary.print_findings(canary.check(), console, everything)

    if record is not None:
        with _one_line_errors("check"):
            from sparsemm_vllm.engine.vllm_api import contract
            from sparsemm_vllm.engine.vllm_api.hooks import HOOKS

            contract.record(HOOKS).save(record)
        console.print(f"saved {record}", highlight=False, markup=False, soft_wrap=True)
        return
    if not run:
        raise typer.Exit(list_differences())
    with _one_line_errors("check"):
        from sparsemm_vllm.commands.check.run_parent import CheckRun, check_folder, run_check

        if result is not None:
            check_folder(result)
        code = run_check(console, list_differences, result, CheckRun())
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the console command."""
    app()


if __name__ == "__main__":
    main()
