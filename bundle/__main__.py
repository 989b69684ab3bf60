"""`python -m bundle folder`: what `make bundle TO=folder` runs. Each failure ends in one line."""

import sys
from pathlib import Path


def main(to: str) -> int:
    try:
        from bundle.folder import BundleError
        from bundle.make import make_bundle
        from workshop_utils.wheel_download import DownloadError

        make_bundle(Path(to).expanduser().resolve())
    except KeyboardInterrupt:  # the imports take seconds, so also while they last
        problem = "interrupted; the same command goes on where it stopped"
    except OSError as error:
        problem = f"{error.filename or to}: {error.strerror or error}. What is finished is kept: the same command goes on"
    except (BundleError, DownloadError) as error:
        problem = str(error)
    else:
        return 0
    print(f"bundle: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
