"""Text that is learned from in several passes and never reads the same twice.

Repeated text is soon known by heart. So every pass after the first cuts the text elsewhere, and a share of its tokens
is drawn anew from what the original predicted in their places: learning asks it for that anyway.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ptq161 import ranks


class Passes:
    """Samples, read in passes, `size` of them in a step; each pass in an order of its own, by (seed, pass).

    samples: (samples, seq) token ids, of which there are at least `size`. share: of the tokens that a pass redraws for
    the next one.
    """

    def __init__(self, samples: Int64[Tensor, "samples seq"], size: int, share: float, seed: int) -> None:
        self.samples, self.size, self.share, self.seed = samples, size, share, seed
        self.text = samples.clone()  # as it reads now: what was read in this pass is ready for the next
        self.steps = len(samples) // size  # of one pass

    def batch(self, step: int) -> Int64[Tensor, "size seq"]:
        """What is read in a step."""
        return self.text.flatten()[self._places(step)]

    def read_again(self, step: int, steps: int) -> bool:
        """Whether any of `steps` is of a later pass than `step`."""
        return (step // self.steps + 1) * self.steps < steps

    def redraw(self, step: int, predicted: Float[Tensor, "own seq vocab"] | None) -> None:
        """Make ready for the next pass what was read in `step`: as given, but for a share of the tokens.

        predicted: the original's logits for this rank's rows of the batch; None if it has none.
        """
        places = self._places(step)
        again = torch.zeros_like(places)
        own = range(ranks.rank(), self.size, ranks.count())
        for row, logits in zip(own, () if predicted is None else predicted, strict=True):
            draws = torch.Generator(again.device).manual_seed(self._seed(step * self.size + row))
            again[row] = self.samples.flatten()[places[row]]
            chosen = torch.rand(again.shape[1] - 1, device=again.device, generator=draws) < self.share
            chance = logits[:-1][chosen].float().softmax(-1)
            again[row, 1:][chosen] = torch.multinomial(chance, 1, generator=draws)[:, 0]
        ranks.add(again)
        self.text.view(-1)[places] = again

    def _places(self, step: int) -> Int64[Tensor, "size seq"]:
        """Where in the text, its samples end to end, the tokens of a step's batch stand."""
        number, within = divmod(step, self.steps)
        draws = torch.Generator().manual_seed(self._seed(number))
        count, length = self.samples.shape
        order = torch.randperm(count, generator=draws)
        cut = int(torch.randint(length, (), generator=draws)) if number else 0
        rows = torch.arange(within * self.size, (within + 1) * self.size)
        shuffled = (rows[:, None] * length + torch.arange(length) + cut) % (count * length)
        return (order[shuffled // length] * length + shuffled % length).to(self.samples.device)

    def _seed(self, number: int) -> int:
        return self.seed * 1_000_003 + number
