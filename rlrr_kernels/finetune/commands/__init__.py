"""The subcommands of ``rlrr-finetune``, a module for each."""
