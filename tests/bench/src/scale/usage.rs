//! What a process and its maps take, as the kernel counts it.

use std::{fs, os::fd::AsRawFd as _, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use proxy_agent::dataplane::{pin::PinRoot, sys};
use serde::Serialize;

/// A process' memory, bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Memory {
    /// `VmRSS`.
    pub resident: u64,
    /// `VmHWM`: the most it ever was.
    pub peak: u64,
}

/// The memory of a process.
pub(super) fn memory(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let field = |name| kibibytes(&text, name).with_context(|| format!("no {name} in {path}"));
    Ok(Memory { resident: field("VmRSS:")?, peak: field("VmHWM:")? })
}

fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// The processor time of a process and of its children that have ended.
pub(super) fn processor(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let ticks = ticks(&text).with_context(|| format!("cannot understand {path}: {text}"))?;
    Ok(Duration::from_secs_f64(ticks as f64 / sys::clock_ticks() as f64))
}

/// `utime`, `stime`, `cutime` and `cstime` (proc_pid_stat(5)). The name before them may hold anything but its last `)`.
fn ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let times: Vec<u64> = fields.split_ascii_whitespace().skip(11).take(4).map_while(|f| f.parse().ok()).collect();
    (times.len() == 4).then(|| times.iter().sum())
}

/// What the kernel holds for all maps that are pinned here, bytes.
pub(super) fn maps(pins: &Path) -> Result<u64> {
    let pins = PinRoot::new(pins.to_owned())?;
    let mut sum = 0;
    for entry in fs::read_dir(pins.maps()).with_context(|| format!("no maps in {}", pins.maps().display()))? {
        let path = entry?.path();
        let map = sys::open_pin(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let Some(map) = map else { continue };
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_raw_fd()))?;
        let bytes = info.lines().find_map(|line| line.strip_prefix("memlock:")).and_then(|n| n.trim().parse().ok());
        sum += bytes.unwrap_or(0u64);
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_stand_behind_a_name_that_may_hold_anything() {
        let stat = "42 (a) b (c)) S 1 42 42 0 -1 4194304 10 20 0 0 7 5 3 2 20 0 1 0 100 1000 10 18446744073709551615";
        assert_eq!(ticks(stat), Some(17));
        assert_eq!(ticks("42 (short) S 1"), None);
    }

    #[test]
    fn our_own_memory_is_known() {
        let own = memory(std::process::id()).unwrap();
        assert!(own.resident > 0 && own.peak >= own.resident, "{own:?}");
        assert_eq!(kibibytes("VmHWM:\t  120 kB\n", "VmHWM:"), Some(122_880));
    }
}
