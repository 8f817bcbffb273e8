//! The machine that a kernel is booted on: this one's processor where KVM can be used, else an emulated one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::{KERNELS, Unpacked, folder, initramfs};
use crate::process::Cmd;

/// What every line of the guest that is meant for us begins with.
pub(crate) const MARK: &str = "fairlead-guest: ";
/// A kernel with KVM is up within a second or two; one that a hypervisor emulates step by step is not.
const PROBE: Duration = Duration::from_secs(15);

/// A panic ends qemu. On a busy machine an emulated timer comes late, which the kernel's check of its timers takes for a
/// fault of the hardware, and panics.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 no_timer_check";

/// How a kernel is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Accel {
    /// By the processor.
    Kvm,
    /// Emulated, ten to twenty times slower: why.
    Tcg(String),
}

impl Accel {
    /// The best that this machine has; found out by booting a kernel, once while it runs.
    pub(crate) fn find() -> Result<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let cache = folder().join("accel");
        if let Some(found) = fs::read_to_string(&cache).ok().and_then(|text| Self::parse(&text, boot.trim())) {
            return Ok(found);
        }
        let found = match probe()? {
            None => Self::Kvm,
            Some(reason) => Self::Tcg(reason),
        };
        let said = if let Self::Tcg(reason) = &found { reason } else { "" };
        fs::write(cache, format!("{} {said}", boot.trim()))?;
        Ok(found)
    }

    /// What an earlier run found, if this machine has not been started anew since.
    fn parse(text: &str, boot: &str) -> Option<Self> {
        let (of, reason) = text.split_once(' ')?;
        (of == boot).then(|| if reason.is_empty() { Self::Kvm } else { Self::Tcg(reason.to_owned()) })
    }

    fn options(&self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg(_) => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }
}

/// Why KVM cannot be used; `None` where it can.
fn probe() -> Result<Option<String>> {
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Ok(Some(format!("/dev/kvm: {error}")));
    }
    let kernel = KERNELS[0].unpacked().context("no kernel has been fetched")?;
    println!("test: trying KVM");
    let guest = Guest { kernel, folder: folder(), accel: Accel::Kvm, append: "fairlead.probe" };
    let mut child = guest.command("")?.stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("qemu")?;
    let start = Instant::now();
    let ended = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if start.elapsed() > PROBE {
            child.kill()?;
            child.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let alive = fs::read_to_string(guest.console()).is_ok_and(|log| log.contains("fairlead-guest: alive"));
    Ok(match ended {
        _ if alive => None,
        None => Some(format!("/dev/kvm is here, but a kernel is not up after {} s with it", PROBE.as_secs())),
        Some(status) => Some(format!("/dev/kvm is here, but qemu ends with it: {status}")),
    })
}

/// A kernel about to be booted.
pub(crate) struct Guest {
    pub(crate) kernel: Unpacked,
    /// Where its files are made.
    pub(crate) folder: PathBuf,
    pub(crate) accel: Accel,
    /// For the kernel's command line.
    pub(crate) append: &'static str,
}

impl Guest {
    /// What the kernel itself says.
    pub(crate) fn console(&self) -> PathBuf {
        self.folder.join("console.log")
    }

    /// Boots, runs the script and powers off. What the script says is the command's output.
    pub(crate) fn command(&self, script: &str) -> Result<Command> {
        let initramfs = initramfs::make(&self.kernel, &self.folder, script)?;
        let shared = |id: &str, path: &Path| {
            let path = comma_doubled(path);
            let fs = format!("local,id={id},path={path},security_model=none,readonly=on,multidevs=remap");
            ["-fsdev".to_owned(), fs, "-device".to_owned(), format!("virtio-9p-pci,fsdev={id},mount_tag={id}")]
        };
        let mut command = Cmd::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "4G", "-smp", "2"])
            .args(self.accel.options())
            .arg("-kernel")
            .arg(self.kernel.image())
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", &format!("{COMMAND_LINE} {}", self.append)])
            .args(["-chardev", &format!("file,id=console,path={}", comma_doubled(&self.console()))])
            .args(["-serial", "chardev:console"])
            .args(["-chardev", "stdio,id=out,signal=off", "-device", "virtio-serial-pci"])
            .args(["-device", "virtconsole,chardev=out"])
            .args(shared("host", Path::new("/")))
            .args(shared("modules", &self.kernel.modules()))
            .into_inner();
        command.stdin(Stdio::null());
        Ok(command)
    }

    /// The end of what the kernel said, for a run that went wrong.
    pub(crate) fn last_words(&self) -> String {
        let log = fs::read(self.console()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
        lines[lines.len().saturating_sub(5)..].join(" | ")
    }
}

/// A comma ends an option of qemu's; two are one.
fn comma_doubled(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// A word of a shell script.
pub(crate) fn quoted(word: &str) -> Result<String> {
    if word.contains('\'') {
        bail!("{word} holds a quote");
    }
    Ok(format!("'{word}'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_is_good_until_the_next_start() {
        assert_eq!(Accel::parse("id-1 ", "id-1"), Some(Accel::Kvm));
        assert_eq!(Accel::parse("id-1 no KVM here", "id-1"), Some(Accel::Tcg("no KVM here".into())));
        assert_eq!(Accel::parse("id-1 ", "id-2"), None);
        assert_eq!(Accel::parse("", "id-2"), None);
    }

    #[test]
    fn paths_stay_one_option() {
        assert_eq!(comma_doubled(Path::new("/a,b")), "/a,,b");
        assert_eq!(quoted("a b").unwrap(), "'a b'");
        assert!(quoted("it's").is_err());
    }
}
