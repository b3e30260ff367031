#!/bin/sh
# After `oras attach` (1.2.3) to the only image of an OCI image layout, skopeo (1.9.3) does not take the layout without a
# name any more: oras lists the artifact in index.json beside the image, and skopeo counts entries, whatever their
# artifactType and subject. The image itself has no name by which it could be chosen.
#
# Seen: "more than one image in oci, choose an image", exit code 1; before attaching, exit code 0.
#
# Needs Go, Python 3, and skopeo 1.9.3 as Debian 12 has it. Takes two minutes. Exits 0 while this is so.
set -eu
work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
cd "$work"
export GOPATH="$work/go" GOBIN="$work"
go install oras.land/oras/cmd/oras@v1.2.3 2> /dev/null
apt-get -q download skopeo=1.9.3+ds1-1+b10 > /dev/null
dpkg-deb -x skopeo_*.deb skopeo

python3 - << 'END'
import gzip, hashlib, io, json, os, tarfile

TYPE = "application/vnd.oci.image."
os.makedirs("layout/blobs/sha256")


def blob(data, kind):
    digest = hashlib.sha256(data).hexdigest()
    with open(f"layout/blobs/sha256/{digest}", "wb") as file:
        file.write(data)
    return {"mediaType": TYPE + kind, "digest": f"sha256:{digest}", "size": len(data)}


out = io.BytesIO()
tarfile.open(fileobj=out, mode="w").close()
diff_id = "sha256:" + hashlib.sha256(out.getvalue()).hexdigest()
config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
manifest = {
    "schemaVersion": 2,
    "mediaType": TYPE + "manifest.v1+json",
    "config": blob(json.dumps(config).encode(), "config.v1+json"),
    "layers": [blob(gzip.compress(out.getvalue()), "layer.v1.tar+gzip")],
}
entry = blob(json.dumps(manifest).encode(), "manifest.v1+json")
with open("layout/index.json", "w") as file:
    json.dump({"schemaVersion": 2, "manifests": [entry]}, file)
with open("layout/oci-layout", "w") as file:
    file.write('{"imageLayoutVersion": "1.0.0"}')
with open("digest", "w") as file:
    file.write(entry["digest"])
END
skopeo/usr/bin/skopeo --version
skopeo/usr/bin/skopeo inspect --raw oci:layout > /dev/null
echo note > note.txt
./oras version | head -1
./oras attach --oci-layout --artifact-type application/vnd.example "layout@$(cat digest)" note.txt:text/plain > /dev/null
if skopeo/usr/bin/skopeo inspect --raw oci:layout > said 2>&1; then
    echo "CHANGED: skopeo takes the layout" >&2
    exit 1
fi
cat said
grep -q "more than one image" said || { echo "CHANGED: it fails in another way" >&2; exit 1; }
echo "as stated"
