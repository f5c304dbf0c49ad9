"""Into a site without a network: outside an adapter is checked and signed, inside it is trusted only by that
signature.

python examples/cookbook/air_gapped.py leave packs/tickets key.pem /media/usb
python examples/cookbook/air_gapped.py arrive /media/usb key.pub models/base merged
"""

import os
import shutil
import sys
from pathlib import Path

import adapterpack

WHO = "adapters@example.org"


def leave(pack: str, key: str, medium: str) -> str:
    """Outside: only a valid pack is copied and signed; returns its id, which may be told by telephone."""
    report = adapterpack.validate(pack)
    if not report.valid:
        raise SystemExit("\n".join(str(finding) for finding in report.findings))
    target = Path(medium) / Path(pack).name
    shutil.copytree(pack, target)
    adapterpack.sign(target, key, identity=WHO, expires="2099-12-31")
    return adapterpack.load(target).id


def arrive(medium: str, public: str, base: str, out: str) -> list[str]:
    """Inside: verifies each pack before anything else is read, checks it against the local base, and merges
    all of them, one by one.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # what is not here is an error, and not a wait
    store, ids = adapterpack.Store(Path(out) / "store"), []
    for folder in sorted(Path(medium).iterdir()):
        # raises Unsigned, WronglySigned or SignatureExpired
        signature = adapterpack.verify(folder, public, identity=WHO)
        report = adapterpack.validate(folder, base)  # the base itself, by content
        if not report.valid:
            raise SystemExit("\n".join(str(finding) for finding in report.findings))
        pack = store.add(folder)
        adapterpack.merge(base, [pack], Path(out) / folder.name)
        print(folder.name, "signed by", signature.identity, pack.id)
        ids.append(pack.id)
    return ids


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    print({"leave": leave, "arrive": arrive}[sys.argv[1]](*sys.argv[2:]))
