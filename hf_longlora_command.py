"""What `hf-longlora` starts: it being imported, the package leaves loading transformers and PEFT to the command."""

import sys


def main() -> int:
    from hf_longlora.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
