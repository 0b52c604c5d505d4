#!/usr/bin/env bash
# What a machine may not have: control groups of version 2 with limits, FAT, quotas and NFS, on a
# kernel of its own, Debian's, in qemu over the files of this machine. Some minutes; ends with 1 where
# a limit is not seen, or two jobs were inside of one run folder.
#
#   bash benchmarks/other_kernel.sh [RACES]
#
# It needs root, and of Debian: qemu-system-x86 busybox-static kmod cpio dosfstools quota
# iproute2 nfs-kernel-server nfs-common rpcbind. The kernel's package is fetched, and not installed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v python)
races=${1:-5}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

image=$(apt-cache depends linux-image-amd64 | awk '/Depends: linux-image/ {print $2}')
apt-get download -qq "$image" 2>/dev/null
dpkg -x linux-image-*.deb kernel
version=$(ls kernel/lib/modules)
depmod -b "$folder/kernel" "$version"

# The first files of the machine: busybox, the modules, and what mounts this machine's files below
# memory that takes what is written.
mkdir -p first/{bin,dev,proc,sys,host,memory,new,modules}
cp "$(command -v busybox)" first/bin/busybox
for name in sh mount mkdir insmod chroot poweroff; do ln -s busybox "first/bin/$name"; done
for module in virtio_pci 9pnet_virtio 9p overlay loop ext4 quota_v2 vfat nls_ascii nls_cp437 nls_utf8 \
  nfsd nfsv3 nfsv4; do
  modprobe -d "$folder/kernel" -S "$version" --show-depends "$module" | awk '$1 == "insmod" {print $2}'
done | awk '!seen[$0]++' | while read -r path; do
  cp "$path" first/modules/
  echo "insmod /modules/${path##*/}"
done >first/modules.sh
cat >first/init <<'INIT'
#!/bin/sh
export PATH=/bin
mount -t proc proc /proc && mount -t devtmpfs dev /dev
sh /modules.sh
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 host /host
mount -t tmpfs memory /memory && mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work overlay /new
mount -t proc proc /new/proc; mount -t sysfs sys /new/sys; mount -t devtmpfs dev /new/dev
mkdir -p /new/dev/shm; mount -t tmpfs shm /new/dev/shm; mount -t tmpfs run /new/run
chroot /new /bin/bash FOLDER/inside
poweroff -f
INIT
chmod +x first/init
sed -i "s|FOLDER|$folder|" first/init
(cd first && find . | cpio --quiet -o -H newc | gzip -1) >first.gz

cat >inside <<INSIDE
export PATH=${python%/*}:/usr/sbin:/usr/bin:/sbin:/bin PYTHONPATH=$root PYTHONDONTWRITEBYTECODE=1
export TMPDIR=/dev/shm races=$races
cd $root
INSIDE
cat >>inside <<'INSIDE'
failed=0
race() { echo "$1:" && shift && python benchmarks/lease.py "$races" "$@" || failed=1; }

mount -t cgroup2 none /sys/fs/cgroup
echo "+cpu +memory" >/sys/fs/cgroup/cgroup.subtree_control
mkdir -p /sys/fs/cgroup/job
echo "+cpu +memory" >/sys/fs/cgroup/job/cgroup.subtree_control
echo "150000 100000" >/sys/fs/cgroup/job/cpu.max
echo 300000000 >/sys/fs/cgroup/job/memory.max
mkdir /sys/fs/cgroup/job/rank
python - <<'PYTHON' || failed=1
import subprocess
import sys
from pathlib import Path

from hpctrain.utils.proc import cpu_budget, cpu_quotas, memory_limits, num_oom_kills

Path("/sys/fs/cgroup/job/rank/cgroup.procs").write_text("0")
quotas, limits = [quota.cpus for quota in cpu_quotas()], [found.limit for found in memory_limits()]
before = num_oom_kills()
ended = subprocess.run([sys.executable, "-c", "[bytes(b'x' * 10**6) for _ in iter(int, 1)]"])
kills = num_oom_kills() - before
print(f"cgroup2: quotas {quotas}, {cpu_budget()} threads, limits {limits}, {kills} killed for memory")
right = quotas == [1.5] and cpu_budget() == 1 and 299_000_000 < min(limits) <= 300_000_000
sys.exit(not (right and ended.returncode == -9 and kills == 1))
PYTHON

mkdir -p /run/{image,fat,quota,server,one,two,old}
mount -t tmpfs image /run/image
truncate -s 64M /run/image/fat /run/image/quota
mkfs.vfat /run/image/fat >/dev/null && mount -o loop /run/image/fat /run/fat || failed=1
race FAT --folder /run/fat

mkfs.ext4 -q -O quota /run/image/quota && mount -o loop,usrquota /run/image/quota /run/quota
setquota -u root 1000 2000 10 20 /run/quota
python - <<'PYTHON' || failed=1
import sys
from pathlib import Path

from hpctrain.preflight.quotas import read_quotas

quotas = read_quotas(Path("/run/quota"))
print("quota:", *quotas.found, quotas.problem)
sys.exit([(each.most_bytes, each.most_files) for each in quotas.found] != [(2000 * 1024, 20)])
PYTHON

mount -t tmpfs server /run/server && mount -t nfsd nfsd /proc/fs/nfsd
mkdir -p /var/lib/nfs/v4recovery
ip link set lo up
rpcbind && rpc.nfsd 4 && rpc.mountd
exportfs -i -o rw,no_root_squash,insecure,fsid=0 127.0.0.1:/run/server
mount -t nfs -o vers=4.2,nosharecache 127.0.0.1:/ /run/one || failed=1
mount -t nfs -o vers=4.2,nosharecache 127.0.0.1:/ /run/two || failed=1
mount -t nfs -o vers=3,nolock,nosharecache 127.0.0.1:/run/server /run/old || failed=1
race "NFS 4.2, two mounts" --folder /run/one --second-mount /run/two
race "NFS 4.2 and 3" --folder /run/one --second-mount /run/old
echo "other kernel: $([[ $failed == 0 ]] && echo passed || echo failed)"
INSIDE

qemu-system-x86_64 -accel tcg,thread=multi -cpu max -m 3G -smp 2 -nographic -no-reboot -net none \
  -kernel kernel/boot/vmlinuz-* -initrd first.gz -append "console=ttyS0 panic=-1 loglevel=3" \
  -fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap \
  -device virtio-9p-pci,fsdev=host,mount_tag=host </dev/null | tee output
grep -q "^other kernel: passed" output
