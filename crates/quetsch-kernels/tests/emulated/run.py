"""Runs a program on an emulated Sapphire Rapids CPU (AMX, AVX-512) under Linux: see README.md here.

    python run.py --bochs BOCHS --kernel VMLINUZ [--env NAME=VALUE]... [--minutes 30] PROGRAM [ARGUMENT]...

Prints what the program printed, and exits with its status.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

BOCHSRC = """
cpu: model=sapphire_rapids, count=1, ips=50000000, exclude_features="{without}"
memory: guest=512, host=512
romimage: file={bios}
vgaromimage: file={vgabios}
vga: extension=none
pci: enabled=1, chipset=i440fx
ata0-master: type=cdrom, path={dir}/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={dir}/serial
log: {dir}/log
display_library: nogui
panic: action=fatal
"""
# Features of this model that the emulator has gaps in. Most are used by the kernel at boot; of AVX-512's there is BF16,
# whose conversion of two vectors reads its second half from behind the first operand.
WITHOUT = "avx512bf16,cet,pks,pku,uintr,la57,waitpkg,tsc_deadline,pcid,invpcid,1g_pages,smap,smep,umip"
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet lpj=1000000 tsc=reliable no_timer_check nokaslr mitigations=off nopti nowatchdog audit=0 "
    "cryptomgr.notests apparmor=0 random.trust_cpu=on lapic=notscdeadline panic=-1"
)
INIT = """#!/bin/sh
/bin/busybox mount -t proc proc /proc
cd /tmp
{command}
echo "program-exit $?"
/bin/busybox sleep 1
/bin/busybox poweroff -f
"""
DIRECTORY, FILE, LINK, DEVICE = 0o040755, 0o100755, 0o120777, 0o020666


def archive(entries):
    """An initramfs (cpio, format newc) of (name, mode, data, device) entries."""
    out = bytearray()
    for i, (name, mode, data, device) in enumerate([*entries, ("TRAILER!!!", 0, b"", (0, 0))]):
        name = name.encode() + b"\0"
        fields = (i + 1, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name), 0)
        out += b"070701" + b"".join(b"%08x" % f for f in fields) + name
        out += bytes(-len(out) % 4)
        out += data
        out += bytes(-len(out) % 4)
    return bytes(out)


def libraries(program):
    """The shared libraries of a program."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", listed)]


def initramfs(busybox, program, command):
    none = (0, 0)
    shared = libraries(program)
    folders = {str(p)[1:] for library in shared for p in library.parents if p != Path("/")}
    return archive(
        [(d, DIRECTORY, b"", none) for d in sorted({"bin", "dev", "proc", "tmp"} | folders)]
        + [(str(library)[1:], FILE, library.read_bytes(), none) for library in shared]
        + [("dev/console", DEVICE, b"", (5, 1)), ("dev/null", DEVICE, b"", (1, 3))]
        + [("bin/busybox", FILE, busybox.read_bytes(), none), ("bin/sh", LINK, b"busybox", none)]
        + [("program", FILE, program.read_bytes(), none)]
        + [("init", FILE, INIT.format(command=command).encode(), none)]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bochs", type=Path, required=True)
    parser.add_argument("--kernel", type=Path, required=True, help="Linux 6.12 of Debian's linux-image-cloud-amd64")
    parser.add_argument("--debian", type=Path, default=Path("/"), help="where the Debian packages are unpacked")
    parser.add_argument("--env", action="append", default=[], help="NAME=VALUE for the program")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("program", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    usr = args.debian / "usr"
    command = " ".join([*map(shlex.quote, args.env), "/program", *map(shlex.quote, args.arguments)])
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        image = directory / "image"
        image.mkdir()
        (image / "initrd").write_bytes(initramfs(args.debian / "bin/busybox", args.program, command))
        (image / "vmlinuz").write_bytes(args.kernel.read_bytes())
        for part in (usr / "lib/ISOLINUX/isolinux.bin", usr / "lib/syslinux/modules/bios/ldlinux.c32"):
            (image / part.name).write_bytes(part.read_bytes())
        (image / "isolinux.cfg").write_text(
            f"default linux\nlabel linux\n kernel vmlinuz\n initrd initrd\n append {KERNEL_ARGUMENTS}\n"
        )
        boot = "-b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table".split()
        iso = [usr / "bin/xorriso", "-as", "mkisofs", "-quiet", "-o", directory / "boot.iso", *boot, image]
        subprocess.run(iso, check=True)
        config = directory / "bochsrc"
        bios = {"bios": usr / "share/bochs/BIOS-bochs-latest", "vgabios": usr / "share/vgabios/vgabios-stdvga.bin"}
        config.write_text(BOCHSRC.format(dir=directory, without=WITHOUT, **bios))
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        try:
            subprocess.run([args.bochs.resolve(), "-q", "-f", config], timeout=60 * args.minutes, check=False, **quiet)
        except subprocess.TimeoutExpired:
            print(f"stopped after {args.minutes} minutes", file=sys.stderr)
        serial = directory / "serial"
        printed = serial.read_text(errors="replace") if serial.exists() else ""
    print(printed)
    status = re.search(r"program-exit (\d+)", printed)
    sys.exit(int(status[1]) if status else "the program did not end")


if __name__ == "__main__":
    main()
