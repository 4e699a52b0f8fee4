"""`sheer plan`: what a run would need on many ranks, computed on one CPU without memory and without the ranks."""
