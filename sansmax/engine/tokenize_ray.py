"""The same work on a Ray cluster: slides over its machines by Ray Data, one encoder in each of its actors.

All machines must see the slides and the output folder under the same paths. What is written is what one machine
writes; a job that was stopped goes on with either engine.
"""

import json
import logging
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sansmax.engine.encoders import Encoder, EncoderSpec, load_encoder
from sansmax.engine.tokenize_records import Record
from sansmax.engine.tokenize_settings import Plan
from sansmax.engine.tokenize_slide import SlideJob, tokenize_slide
from sansmax.errors import InputError
from sansmax.optional import need


def tokenize_by_ray(
    jobs: Sequence[SlideJob],
    plan: Plan,
    encoder: Encoder | None,
    concurrency: int | None,
) -> Iterator[Record]:
    """The records of the slides as they are finished, `concurrency` of them at a time.

    A cluster that runs is used (RAY_ADDRESS, or `ray.init` before); else one is made of this machine, for as long as
    the work takes. With a GPU in the cluster each actor takes one.
    """
    ray, data = need("ray", "ray"), need("ray.data", "ray")
    if not jobs:
        return
    with _cluster(ray):
        data.DataContext.get_current().enable_progress_bars = False
        # its own lines on plans and executions; ours say what is going on
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        # as text: a column of numbers would make NaN of None
        rows = [{"job": json.dumps({**vars(job), "path": str(job.path)})} for job in jobs]
        made = data.from_items(rows, override_num_blocks=len(rows)).map(
            _SlideActor,
            fn_constructor_args=(plan, encoder and encoder.sha256, torch.get_num_threads()),
            compute=data.ActorPoolStrategy(size=min(concurrency or _places(ray, plan), len(jobs))),
            num_cpus=1,
            num_gpus=1 if _has_gpu(ray, plan) else 0,
        )
        for row in made.iter_rows():
            if row["error"]:
                raise InputError(row["error"])
            known = json.loads(row["record"])
            yield Record(**{**known, "warnings": tuple(known["warnings"])})


@contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """The cluster that is there, or one of this machine that ends with the block."""
    if ray.is_initialized():
        yield
        return
    # it would say of every actor that it cannot be started again; the next run does that
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray.init(log_to_driver=False, include_dashboard=False, logging_level="error")
    try:
        yield
    finally:
        ray.shutdown()


class _SlideActor:
    """Lives in a process of the cluster, with its own encoder."""

    def __init__(self, plan: Plan, sha256: str | None, threads: int) -> None:
        # the order of sums depends on the number of threads
        torch.set_num_threads(threads)
        self.plan, self.encoder, self.refusal = plan, None, ""
        try:
            if plan.encoder is not None:
                self.encoder = _same_encoder(plan.encoder, sha256)
        except InputError as error:
            # an actor that dies here would take its reason with it
            self.refusal = str(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A slide in, its record out, as text, or what ends the work."""
        if self.refusal:
            return {"record": "", "error": f"{platform.node()}: {self.refusal}"}
        job = json.loads(row["job"])
        try:
            record = tokenize_slide(SlideJob(**{**job, "path": Path(job["path"])}), self.plan, self.encoder)
        except (InputError, OSError) as error:
            return {"record": "", "error": f"{platform.node()}: {error}"}
        return {"record": json.dumps(asdict(record)), "error": ""}


def _same_encoder(spec: EncoderSpec, sha256: str | None) -> Encoder:
    encoder = load_encoder(spec)
    if encoder.sha256 != sha256:
        raise InputError(
            f"there are other weights of {spec.name} than on the machine where the work began; copy its cache, or name "
            "a folder that all see by local-dir:"
        )
    return encoder


def _has_gpu(ray: Any, plan: Plan) -> bool:
    wanted = plan.encoder is not None and plan.encoder.device != "cpu"
    return wanted and ray.cluster_resources().get("GPU", 0) > 0


def _places(ray: Any, plan: Plan) -> int:
    """How many slides at a time: one for each GPU, without one as many as processors give to an encoder and readers."""
    resources = ray.cluster_resources()
    if _has_gpu(ray, plan):
        return int(resources["GPU"])
    return max(1, int(resources.get("CPU", 1)) // (plan.workers + 1))
