"""The method itself on a built-in task: VPPO beside GRPO and others, over seeds."""
