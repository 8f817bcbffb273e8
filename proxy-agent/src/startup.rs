//! What the agent says once when it has begun: what it found, and how it serves. One event, so that it stays together.

use std::fs;

use crate::args::AttachMode;
use crate::dataplane::probe::Features;
use crate::devices::Devices;

/// What was found before the programs were loaded.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// By trying.
    pub features: Features,
    /// The node has IPv6.
    pub ipv6: bool,
    /// kube-proxy's rules stand.
    pub kube_proxy: bool,
}

/// Says it.
pub fn report(found: Found, mode: AttachMode, devices: &Devices, node: &str, source: &str) {
    let Found { features: Features { tcx, fib_source }, ipv6, kube_proxy } = found;
    let attach = match mode {
        AttachMode::Tcx => "tcx",
        AttachMode::Auto if tcx => "tcx",
        AttachMode::Auto | AttachMode::Clsact => "clsact",
    };
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        kernel = kernel(),
        mode = "tc",
        attach,
        tcx,
        fib_source,
        ipv6,
        kube_proxy,
        cgroup_root = cgroup_root(&fs::read_to_string("/proc/mounts").unwrap_or_default()).unwrap_or("none"),
        devices = devices.served().join(" "),
        node,
        source,
        "serving this node"
    );
}

fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

/// Where cgroup2 is mounted; beside a v1 tree it stands below that.
fn cgroup_root(mounts: &str) -> Option<&str> {
    let mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    mounts.filter(|fields| fields.get(2) == Some(&"cgroup2")).find_map(|fields| fields.get(1).copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_root_is_where_cgroup2_is_mounted() {
        let unified = "sysfs /sys sysfs rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        assert_eq!(cgroup_root(unified), Some("/sys/fs/cgroup"));
        let hybrid = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup_root(hybrid), Some("/sys/fs/cgroup/unified"));
        assert_eq!(cgroup_root("cgroup2 /somewhere tmpfs rw 0 0\n"), None);
    }
}
