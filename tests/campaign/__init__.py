"""A seeded, bounded fault campaign over the label store: `python -m tests.campaign [--seed N] [--short]`."""
