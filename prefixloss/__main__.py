"""`python -m prefixloss` is the `prefixloss` command."""

from prefixloss.cli import main

main()
