"""Worlds that a policy acts in, for demonstrations, ground truth and closed-loop evaluation."""
