"""Steps of AdamW over a pool of examples that lies on the device; on CUDA a step is one captured graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter

import torch
from torch import Tensor, nn

from pipeline.report import log

WARMUP = 300
GRAD_CLIP = 1.0
_BEFORE_CAPTURE = 3
"""Steps on a side stream that let libraries set themselves up, as torch.cuda.graph asks."""


class Loop:
    """steps: optimizer steps. lr: peak; a linear warm-up, then half a cosine to zero."""

    def __init__(
        self, name: str, parameters: Iterable[nn.Parameter], *, steps: int, lr: float, device: torch.device
    ) -> None:
        self.name, self.steps, self.device = name, steps, device
        self._parameters = list(parameters)
        self._lr = torch.tensor(lr, device=device)
        self._peak = lr
        on_gpu = device.type == "cuda"
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=self._lr, weight_decay=1e-3, betas=(0.9, 0.99), fused=on_gpu, capturable=on_gpu
        )
        self._started = perf_counter()

    def run(
        self,
        loss: Callable[[Tensor], dict[str, Tensor]],
        index: Tensor,
        pool: int,
        *,
        every: int = 200,
        graph: bool = True,
        after: Callable[[int], None] | None = None,
    ) -> Iterator[dict[str, float]]:
        """Do the steps; yield means of what `loss` returns every so many. index: filled with rows of the
        pool. graph: False where a step cannot be captured. after: called with the number of each step, from 0."""

        def step() -> Tensor:
            values = loss(index)
            values["loss"].backward()
            nn.utils.clip_grad_norm_(self._parameters, GRAD_CLIP, foreach=True)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=False)
            self.names = list(values)
            return torch.stack([value.detach().float() for value in values.values()])

        def prepare(number: int) -> None:
            index.random_(pool)
            done = number / self.steps
            factor = min(1.0, (number + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * done))
            self._lr.fill_(self._peak * factor)

        run, results = step, None
        if graph and self.device.type == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for number in range(_BEFORE_CAPTURE):
                    prepare(number)
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            captured = torch.cuda.CUDAGraph()
            prepare(0)
            with torch.cuda.graph(captured):
                results = step()

            def run() -> Tensor:
                captured.replay()
                return results

        total, count = None, 0
        for number in range(self.steps):
            prepare(number)
            values = run()
            if after is not None:
                after(number)
            total = values.clone() if total is None else total + values
            count += 1
            if (number + 1) % every == 0 or number + 1 == self.steps:
                means = dict(zip(self.names, (total / count).tolist(), strict=True))
                total, count = None, 0
                yield {"step": number + 1, **means}

    def say(self, record: dict[str, float]) -> None:
        seconds = perf_counter() - self._started
        shown = ", ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")
        log(f"{self.name} {record['step']:.0f}/{self.steps}: {shown}; {seconds:.0f} s")
