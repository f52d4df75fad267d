"""What ``rlrr-finetune`` does, one module a command; ``finetune/cli.py`` holds the table."""
