"""NegLabel: a score of the classes beside labels that are none of them."""

from __future__ import annotations

from torch import Tensor

from setar_peft.detection.per_image import check_count, check_logits, per_image

# Published: 100 groups of 10,000 labels, 100 each.
_GROUPS = 100
_GROUP_SIZE = 100


def neglabel(
    global_logits: Tensor, negative_logits: Tensor, temperature: Tensor | float = 1.0, groups: int | None = None
) -> Tensor:
    """NegLabel: the softmax probability of all classes together, beside labels that are none of them.

    The negative labels are dealt into groups of one size, an image's score is the mean over the groups, and labels that
    are left over, the last of the list, are not read: all as published, where the groups are drawn at random with a
    fixed seed. Here they are dealt in turn (label i to group i % groups), so that a list in any order, sorted by
    likeness as the published one, is spread evenly, and the score is the same everywhere.

    Source: Jiang et al., 2024, https://arxiv.org/abs/2403.20078: softmax of cosines over 0.01. The logits of a CLIP are
    its cosines times 100, so that this is their temperature 1.

    Args:
        global_logits: (n, classes), floating.
        negative_logits: Logits of the same images to the negative labels, (n, negative labels), floating.
        temperature: Divides the logits, > 0.
        groups: From 1 to the number of negative labels; by default one for every 100 of them, at least 1 and at most
            100, the published number for its 10,000.

    Returns:
        (n,) float32, in [0, 1].

    Raises:
        ValueError: As `mcm`; if the two are not of the same images; or if groups is out of its range.
    """
    check_logits("global_logits", global_logits, ("n", "classes"))
    check_logits("negative_logits", negative_logits, ("n", "negative labels"))
    if global_logits.shape[0] != negative_logits.shape[0]:  # not len(), which torch.export takes for a constant
        raise ValueError(
            f"global_logits are of {len(global_logits)} images and negative_logits of {len(negative_logits)}; give "
            "those of the same images."
        )
    labels = negative_logits.shape[1]
    if groups is None:
        groups = min(max(labels // _GROUP_SIZE, 1), _GROUPS)
    check_count("groups", groups, labels, f"there are {labels} negative labels")
    kept = labels - labels % groups
    classes = per_image(global_logits, temperature, lambda scaled: scaled.logsumexp(-1))
    negative = per_image(
        negative_logits, temperature, lambda scaled: scaled[:, :kept].reshape(-1, kept // groups, groups).logsumexp(1)
    )
    return (classes[:, None] - negative).sigmoid().mean(-1)
