"""The evaluation room: success rates of policies in closed loop, through the community harness `vla-eval`."""
