#!/usr/bin/env bash
# The compiled operators on Arm, emulated: csrc/ is compiled for aarch64, and its tests run under qemu as three kinds of
# processor, one after another. Says nothing about speed. On Debian or Ubuntu; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
ROOT=$PWD/runs/arm
for tool in aarch64-linux-gnu-g++ qemu-aarch64-static apt-get unshare; do
    command -v $tool >/dev/null || { echo "$tool is missing: apt-get install g++-aarch64-linux-gnu qemu-user-static" >&2; exit 1; }
done

# A Python of that kind, beside this machine's own packages and not among them.
if [ ! -e "$ROOT/complete" ]; then
    mkdir -p "$ROOT"/{lists/partial,debs,system,site}
    apt() { apt-get -qq -o APT::Architectures=amd64,arm64 -o Dir::State::lists="$ROOT/lists" -o APT::Sandbox::User=root "$@"; }
    apt update
    python=$(apt-cache -o Dir::State::lists="$ROOT/lists" -o APT::Architectures=amd64,arm64 depends python3:arm64 | sed -n 's/.*Depends: \(python3\.[0-9]*\):\?.*/\1/p' | head -1)
    packages="$python-minimal lib$python-minimal lib$python-stdlib libc6 libstdc++6 libgcc-s1 libgomp1 libssl3 zlib1g libexpat1
              libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1"
    (cd "$ROOT/debs" && apt download $(printf '%s:arm64 ' $packages))
    for package in "$ROOT"/debs/*.deb; do dpkg -x "$package" "$ROOT/system"; done
    .venv/bin/python -m pip install --quiet --no-deps --only-binary :all: --target "$ROOT/site" --python-version "${python#python}" \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        --requirement tests/arm/requirements.txt
    echo "$python" > "$ROOT/complete"
fi
PYTHON=$(cat "$ROOT/complete")

rm -rf "$ROOT/native"
CXX=aarch64-linux-gnu-g++ .venv/bin/python hatch_build.py "$ROOT/native"
for kind in neonbf16 neondot neon; do
    [ -e "$ROOT/native/kernels-$kind.so" ] || { echo "kernels-$kind.so did not compile" >&2; exit 1; }
done
test_as() {  # a processor with these features, as Linux names them
    echo "As a processor with $1:"
    echo "Features : fp $1" > "$ROOT/cpuinfo"
    unshare --map-root-user --mount bash -c 'mount --bind "$0" /proc/cpuinfo && exec "$@"' "$ROOT/cpuinfo" \
        qemu-aarch64-static -cpu max -L "$ROOT/system" -E PYTHONPATH="$ROOT/site:$PWD/src:$PWD" \
        -E HEADWAY_NATIVE_FOLDER="$ROOT/native" -E PYTHONDONTWRITEBYTECODE=1 "$ROOT/system/usr/bin/$PYTHON" \
        -m pytest -p no:cacheprovider --noconftest -p tests.conftest "${@:2}"
}
test_as "asimd" tests/cpu/test_panels.py "$@"  # with all that it can run
test_as "asimd asimddp" tests/cpu/test_panels.py "$@"
test_as "asimd asimddp bf16" tests/cpu/test_panels.py tests/cpu/test_native.py tests/cpu/test_layers.py "$@"
