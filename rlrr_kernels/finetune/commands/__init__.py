"""What ``rlrr-finetune`` does, one module a command; ``finetune/__main__.py`` holds the table."""
