"""SeTAR from end to end on real images, offline: scikit-learn's handwritten digits and a small CLIP trained on them."""

from setar_peft.demo import digits

__all__ = ["digits"]
