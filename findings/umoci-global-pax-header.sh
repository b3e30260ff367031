#!/bin/sh
# umoci 0.6.0 refuses a layer that has a pax global extended header (type flag "g", POSIX.1-2017, pax, "pax Header
# Block"), as `git archive` and Python's tarfile write them. GNU tar unpacks the same layer; containerd and Docker pass
# over such headers.
#
# Seen: "unpack entry: @PaxHeader: unknown typeflag '\x67'", exit code 1; without the header, exit code 0.
#
# Needs Go, Python 3, GNU tar and root. Takes a minute. Exits 0 while this is so.
set -eu
work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
cd "$work"
export GOPATH="$work/go" GOFLAGS=-mod=mod

mkdir build
(
    cd build
    go mod init finding 2> /dev/null
    go get github.com/opencontainers/umoci/cmd/umoci@v0.6.0 2> /dev/null
    go build -o ../umoci github.com/opencontainers/umoci/cmd/umoci
)

cat > layouts.py << 'END'
import gzip, hashlib, io, json, os, tarfile

TYPE = "application/vnd.oci.image."


def layer(**records):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers=records) as tar:
        member = tarfile.TarInfo("hello")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"hi\n"))
    return out.getvalue()


def layout(name, tar):
    os.makedirs(f"{name}/blobs/sha256")

    def blob(data, kind):
        digest = hashlib.sha256(data).hexdigest()
        with open(f"{name}/blobs/sha256/{digest}", "wb") as file:
            file.write(data)
        return {"mediaType": TYPE + kind, "digest": f"sha256:{digest}", "size": len(data)}

    diff_id = "sha256:" + hashlib.sha256(tar).hexdigest()
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
    manifest = {
        "schemaVersion": 2,
        "mediaType": TYPE + "manifest.v1+json",
        "config": blob(json.dumps(config).encode(), "config.v1+json"),
        "layers": [blob(gzip.compress(tar), "layer.v1.tar+gzip")],
    }
    entry = blob(json.dumps(manifest).encode(), "manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    with open(f"{name}/index.json", "w") as file:
        json.dump({"schemaVersion": 2, "manifests": [entry]}, file)
    with open(f"{name}/oci-layout", "w") as file:
        file.write('{"imageLayoutVersion": "1.0.0"}')
    with open(f"{name}.tar", "wb") as file:
        file.write(tar)


layout("plain", layer())
layout("global", layer(comment="made by a build"))
END
python3 layouts.py

./umoci --version | head -1
./umoci unpack --image plain:latest plain-bundle
[ "$(cat plain-bundle/rootfs/hello)" = hi ]
[ "$(tar -xOf global.tar hello)" = hi ]
if ./umoci unpack --image global:latest global-bundle > said 2>&1; then
    echo "CHANGED: umoci unpacks it now" >&2
    exit 1
fi
cat said
grep -q "unknown typeflag '.x67'" said || { echo "CHANGED: it fails in another way" >&2; exit 1; }
echo "as stated"
