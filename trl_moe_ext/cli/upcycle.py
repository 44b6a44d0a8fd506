"""`trl-moe upcycle`: a dense checkpoint becomes a mixture of experts with the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def upcycle(
    dense: Annotated[Path, typer.Argument(help="Directory of a llama, mistral, qwen2 or qwen3 checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    num_experts: Annotated[int, typer.Option(help="Copies of each MLP.")] = 4,
    top_k: Annotated[int, typer.Option(help="Experts a token.")] = 2,
    noise: Annotated[
        float, typer.Option(help="Noise on the copies, in standard deviations of each weight. Changes the logits.")
    ] = 0.0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the routers and the noise.")] = 0,
    gguf_file: Annotated[str | None, typer.Option(help="Read this GGUF file of DENSE.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
) -> None:
    """Turn a dense checkpoint into a mixture of experts with the same logits."""
    from trl_moe_ext.experts.upcycle import LOGITS_TOLERANCE, UpcycleOptions, upcycle

    options = UpcycleOptions(num_experts=num_experts, top_k=top_k, noise=noise, dtype=dtype, seed=seed)
    report = upcycle(dense, out, options, gguf_file=gguf_file, overwrite=overwrite)
    expectation = "expected with --noise" if noise else f"tolerance {LOGITS_TOLERANCE:.0e}"
    typer.echo(
        f"{report.source} -> {report.target}: {report.layers} layers of {num_experts} experts, top-{top_k}, "
        f"{report.dtype}\n"
        f"parameters: {report.dense_parameters:,} dense -> {report.parameters:,}, "
        f"{report.active_parameters:,} active for a token\n"
        f"largest difference of logits in fp32: {report.max_difference:.1e} ({expectation})\n"
        f"written to {out}"
    )
