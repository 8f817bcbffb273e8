//! What a program says of itself in its ELF header: for which processor it is, and whether it needs anything else.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use super::Arch;

/// `e_machine` (elf.h).
const fn machine(arch: Arch) -> u16 {
    match arch {
        Arch::X86 => 62,
        Arch::Arm => 183,
    }
}

/// `p_type` of the header that names a dynamic linker.
const PT_INTERP: u32 = 3;

/// Fails unless the file is a program for this processor that needs no library.
pub(super) fn check(program: &Path, arch: Arch) -> Result<()> {
    let bytes = fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    let told = || format!("{} is no program of 64-bit ELF", program.display());
    ensure!(bytes.starts_with(&[0x7f, b'E', b'L', b'F', 2, 1]), told());
    let found = u16::from_le_bytes(field(&bytes, 18).with_context(told)?);
    ensure!(found == machine(arch), "{} is for machine {found}, not for {}", program.display(), arch.name());
    let table = u64::from_le_bytes(field(&bytes, 32).with_context(told)?) as usize;
    let size = usize::from(u16::from_le_bytes(field(&bytes, 54).with_context(told)?));
    let count = usize::from(u16::from_le_bytes(field(&bytes, 56).with_context(told)?));
    for n in 0..count {
        let kind = u32::from_le_bytes(field(&bytes, table + n * size).with_context(told)?);
        ensure!(kind != PT_INTERP, "{} is not static: it names a dynamic linker", program.display());
    }
    Ok(())
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_for_another_processor_and_one_that_is_not_static_are_refused() {
        // A test program of cargo's is neither static nor for another machine.
        let own = std::env::current_exe().unwrap();
        let error = check(&own, Arch::host()).unwrap_err().to_string();
        assert!(error.contains("dynamic linker"), "{error}");
        let other = Arch::host().other();
        let error = check(&own, other).unwrap_err().to_string();
        assert!(error.ends_with(&format!("not for {}", other.name())), "{error}");
        let error = check(Path::new("/etc/passwd"), Arch::host()).unwrap_err().to_string();
        assert!(error.ends_with("no program of 64-bit ELF"), "{error}");
    }

    #[test]
    fn a_static_program_passes() {
        // No program headers at all.
        let mut header = vec![0; 64];
        header[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        header[18] = 183;
        let file = std::env::temp_dir().join(format!("xtask-elf-{}", std::process::id()));
        fs::write(&file, &header).unwrap();
        let checked = check(&file, Arch::Arm);
        fs::remove_file(&file).unwrap();
        checked.unwrap();
    }
}
