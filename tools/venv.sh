# Sourced by tools/demo.sh and tests/run.sh, from the root of the repository: `prepare EXTRA` puts the project and
# what that extra needs into .venv (once per state of the requirements) and sets $python.

prepare() {
    python=.venv/bin/python
    stamp=".venv/.installed-$1"
    wanted=$(cat setup.cfg constraints.txt | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "wanted Python 3.10 or later, found $("${PYTHON:-python3}" --version): set PYTHON to a newer one" >&2
        exit 2
    fi
    if [ ! -x "$python" ] && ! "${PYTHON:-python3}" -m venv .venv; then
        echo "cannot make a virtual environment: install python3-venv (Debian: apt-get install python3-venv)" >&2
        exit 2
    fi
    echo "installing what [$1] needs into .venv (once; about a minute)"
    "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$1]" || exit 2
    if ! "$python" -c 'import cv2' 2>/dev/null; then
        # a bare server has no libGL; the headless build is the same OpenCV without windows
        echo "opencv-python does not load here, taking opencv-python-headless instead"
        "$python" -m pip uninstall --quiet --yes opencv-python
        "$python" -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps \
            opencv-python-headless || exit 2
        "$python" -c 'import cv2' || exit 2
    fi
    echo "$wanted" > "$stamp"
}
