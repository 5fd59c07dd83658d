"""`bisect attribute`: how much of a margin's change each stage's own error causes, by gradients, checked by runs.

One *base* network, the reference's file in float arithmetic, carries both sides: a side's **local error** at a
stage is its value minus what the base computes from that side's own inputs. The base with these errors added at
every stage is that side, to the rounding of the float type. So the change of the margin from one side to the other is
the integral, along the straight line between the two sets of errors, of the base's gradient times their difference:
integrated gradients (arXiv:1703.01365) over stages instead of inputs. One step of it is the first-order estimate
(attribution patching, arXiv:2310.10348).
"""
