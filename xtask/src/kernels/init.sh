#!/busybox sh
# First process of another kernel: makes this machine's files its root, with writes kept in memory, and goes on there.
b=/busybox
fail() { echo "fairlead-guest: $*" >/dev/console; $b poweroff -f; }
$b mount -t proc proc /proc && $b mount -t sysfs sys /sys && $b mount -t devtmpfs dev /dev || fail "no /proc, /sys, /dev"
if $b grep -q fairlead.probe /proc/cmdline; then
    echo "fairlead-guest: alive" >/dev/console
    $b poweroff -f
fi
for module in $($b cat /modules/order); do
    $b insmod "/modules/$module" || fail "cannot load $module"
done
options=trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro
$b mount -t 9p -o $options host /host || fail "cannot mount this machine's files"
$b mount -t tmpfs -o size=90% writes /writes && $b mkdir /writes/upper /writes/work || fail "no room for writes"
$b mount -t overlay -o lowerdir=/host,upperdir=/writes/upper,workdir=/writes/work root /root || fail "no overlay"
$b mkdir -p /root/lib/modules && $b mount -t 9p -o $options modules /root/lib/modules || fail "no modules"
$b cp /run.sh /root/fairlead-guest.sh || fail "nothing to run"
exec $b switch_root /root /bin/sh /fairlead-guest.sh
