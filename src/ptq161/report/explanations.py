"""What the page says about how a model was quantized, for readers of no paper."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptq161.report.palette import WIDTHS


@dataclass(frozen=True)
class Explanation:
    """Sentences about one method."""

    in_short: str
    ranking: str  # why some columns get more bits than others
    factors: str  # what brings a level back to size
    learning: str  # what is learned of a block
    unlearned: str  # the same where nothing is (`epochs=0`)
    channels: str  # what decides between channels; {measure} is its formula


EXPLANATIONS = {
    "ptq161": Explanation(
        in_short="Nothing was retrained: a calibration text was run through the model, block by block, to decide which "
        "few weights deserve 4 bits and how large the signs should count.",
        ranking="Some input channels carry far larger values than others, and an error in their column costs more. "
        "Those salient columns keep 4 bits a weight, of all others only the sign is kept.",
        factors="Signs are scaled by a size per row and one per column, numbers by a size and a zero level per row.",
        learning="Signs and numbers stay fixed; what is learned are the sizes of the signs per row and per column.",
        unlearned="Nothing was learned: signs, numbers and sizes are those of the original weights, rounded.",
        channels="How large the values x are that reach each input channel of some layers: {measure} in the original "
        "model on the calibration text.",
    ),
    "mixed": Explanation(
        in_short="A calibration text decided which weights deserve more than others, and then what is stored of each, "
        "so that every block of the model does what the original one did.",
        ranking="An error costs far more in some columns than in others: where the input channel carries large values, "
        "or the column holds large weights. So each column gets as many bits as it is worth.",
        factors="A row has one size for each kind of column to scale its weights by, and nothing else.",
        learning="Codes and sizes are learned together: a weight may change its sign, its level or become zero.",
        unlearned="Nothing was learned: column after column was rounded, and the columns still to come made up for "
        "the error.",
        channels="How much each input channel of some layers counts: {measure}, where x is what reaches the channel in "
        "the original model on the calibration text, and w are the weights it is multiplied with.",
    ),
}

_MAGNITUDES = {
    "mse": "Mean squared error",
    "l2": "Length of the error vector, mean over tokens",
    "relative": "Squared error relative to the square of what was wanted, mean over tokens",
}


def widths_in_words(shares: Mapping[str, float]) -> str:
    """One sentence: what share of the weights has become what. shares: by code width."""
    parts = [
        f"{shares[name]:.0%} become {levels} ({label})" for name, (label, _, levels) in WIDTHS.items() if name in shares
    ]
    return f"Of the weights, {'; '.join(parts)}."


def learning_in_words(config: Mapping[str, Any]) -> str:
    """One sentence: how codes and sizes of a block came about, by the settings."""
    explanation = EXPLANATIONS[config["method"]]
    return explanation.learning if config["epochs"] else explanation.unlearned


def objective_in_words(config: Mapping[str, Any]) -> str:
    """The distance between what a block gives and what is wanted, by the settings."""
    return _MAGNITUDES[config["magnitude"]] + (", plus negative logarithm of the cosine" if config["angular"] else "")


def distillation_in_words(record: Mapping[str, Any]) -> str:
    """What the tuning of the whole model did. record: `distillation` of the JSON of `ptq161 quantize`."""
    if "skipped" in record:
        return (
            "Learning all blocks together, the last step of this method, was skipped on the machine where the model "
            f"was made: it {record['skipped']}."
        )
    text = "parts of the text that the blocks were not learned on" if record["fresh"] else "the same text"
    if record.get("written_tokens"):
        text += f", lengthened by {record['written_tokens']:,} that the original wrote itself"
    change = f"{record['held_out_first']:.3f} to {record['held_out_last']:.3f} nats per token"
    verdict = "" if record["kept"] else " That is no gain, so the model was left as the blocks had made it."
    return (
        "Blocks that each come close can still add up to a model that does not. So in the end the codes and sizes of "
        "all blocks and the norms were learned together, towards the original's prediction of every next token, on "
        f"{record['tokens']:,} tokens of {text}. On passages held out from that, the difference between the two "
        f"predictions (Kullback-Leibler divergence) went from {change}.{verdict}"
    )
