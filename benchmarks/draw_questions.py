"""Held-out questions as a folder of pictures, for `sparsemm eval --data` and for lm-eval.

    python benchmarks/draw_questions.py reader --out build/questions
    python benchmarks/draw_questions.py instrument --samples 300 --out build/instrument

The folder is one of `datasets`' imagefolder: pictures, and ``metadata.jsonl`` with `file_name`,
`question`, `answer`, `task` and, for the instrument, `context`, a system message.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from offline.subjects import SUBJECTS

from sparsemm_vllm.commands.evaluate.questions import FIRST_SEED, TASKS
from sparsemm_vllm.files import write_whole


def draw_questions(
    subject: Annotated[str, typer.Argument(help=f"Who is asked: {' or '.join(SUBJECTS)}.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    samples: Annotated[int, typer.Option(help="Questions of each task.", min=1)] = 300,
    first: Annotated[int, typer.Option(help="First held-out picture.", min=0)] = FIRST_SEED,
) -> None:
    """Write held-out questions of both tasks."""
    if subject not in SUBJECTS:
        raise typer.BadParameter(f"known: {', '.join(SUBJECTS)}", param_hint="SUBJECT")
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for task, kind in TASKS.items():
        questions = SUBJECTS[subject].held_out(first, samples, kind)
        contexts = questions.contexts or [""] * samples
        for number, (sample, context) in enumerate(zip(questions.samples, contexts, strict=True)):
            name = f"{task}-{first + number}.png"
            sample.image.save(out / name)
            row = {
                "file_name": name,
                "task": task,
                "question": sample.question,
                "answer": sample.answer,
            }
            rows.append(row | {"context": context} if context else row)
    lines = [json.dumps(row) + "\n" for row in rows]
    write_whole(out / "metadata.jsonl", "".join(lines))
    typer.echo(f"wrote {len(rows)} questions to {out}")


if __name__ == "__main__":
    typer.run(draw_questions)
