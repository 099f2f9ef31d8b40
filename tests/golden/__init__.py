"""Stores of released format versions, checked in as they were written. Readers must go on reading them."""
