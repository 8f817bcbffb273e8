# What another kernel's root needs before tests run; `run NAME DIR PROGRAM ARGUMENT…` lines follow.
for fs in proc:/proc sysfs:/sys devtmpfs:/dev; do mount -t "${fs%%:*}" "${fs%%:*}" "${fs#*:}"; done
exec >/dev/hvc0 2>&1 </dev/null
stty -F /dev/hvc0 -onlcr
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ip link set lo up
# Some look for their own module, or are asked for before anything loads it; nobody makes /dev/net/tun by hand.
modprobe -a bridge br_netfilter nf_conntrack tun || echo "fairlead-guest: modules are missing"
echo "fairlead-guest: kernel $(uname -r)"
run() {
    name=$1 dir=$2
    shift 2
    echo "fairlead-guest: runs $name"
    (cd "$dir" && CARGO_MANIFEST_DIR=$dir exec "$@")
    echo "fairlead-guest: ended $name $?"
}
