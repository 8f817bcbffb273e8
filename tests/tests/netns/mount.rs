//! `fairlead mount`, which the DaemonSet runs before the agent.

use std::process::Command;

use fairlead_lab::{agent::find_binary, netns};

#[test]
fn a_missing_bpf_file_system_is_mounted_once() {
    let script = "while umount -l /sys/fs/bpf 2>/dev/null; do :; done; \"$0\" mount && \"$0\" mount && stat -f -c %t /sys/fs/bpf";
    let mut command = Command::new("unshare");
    // A mount namespace of its own: the machine's file system stays where it is.
    command.args(["--mount", "--propagation", "private", "sh", "-c", script]).arg(find_binary().unwrap());
    let said = netns::run(&mut command).unwrap();
    assert_eq!(said, "mounted the BPF file system\na BPF file system is mounted\ncafe4a11\n");
}
