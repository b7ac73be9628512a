"""The verification that the norms which a clipper finds are those of the whole gradients."""

from dist_clip.verify.check import verify
from dist_clip.verify.report import VerifiedNorm, VerifyReport

__all__ = ["VerifiedNorm", "VerifyReport", "verify"]
