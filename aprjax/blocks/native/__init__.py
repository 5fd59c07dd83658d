"""Integer products in machine code of our own, for processors that have instructions for them."""
