"""The command ``vllm-rfork``; one module per subcommand."""
