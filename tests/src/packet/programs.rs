//! The object's programs, those of a family loaded when its first packet comes: the verifier's time is most of a test's.

use std::cell::RefCell;
use std::os::fd::{AsFd as _, OwnedFd};

use aya::Ebpf;
use aya::maps::{Map, MapData, ProgramArray};
use aya::programs::SchedClassifier;
use proxy_agent::dataplane::load;
use proxy_common::abi::program;
use proxy_common::{Family as _, V4, V6};

use super::kernel::Entry;
use super::ran::Hook;

/// Slots of `PROGRAMS` for the stubs, which in life are attached to devices.
const INGRESS_STUB: (&str, u32) = (load::INGRESS_STUB, 14);
const EGRESS_STUB: (&str, u32) = (load::EGRESS_STUB, 15);

/// The programs, behind the entries that stand for the hooks of a device.
pub(super) struct Programs {
    loader: RefCell<Loader>,
    ingress: Entry,
    egress: Entry,
    /// Without a holder the kernel would empty the array.
    _array: OwnedFd,
}

struct Loader {
    /// Its programs alone: the maps have been taken out.
    ebpf: Ebpf,
    array: ProgramArray<MapData>,
    loaded: Vec<u32>,
}

impl Programs {
    /// Of an object whose other maps have been taken out.
    pub(super) fn new(ebpf: Ebpf, array: Map) -> Self {
        let Map::ProgramArray(data) = &array else { panic!("PROGRAMS is a program array") };
        let fd = data.fd().as_fd().try_clone_to_owned().expect("a descriptor can be copied");
        let [ingress, egress] = [INGRESS_STUB, EGRESS_STUB].map(|(_, slot)| Entry::to_slot(fd.as_fd(), slot));
        let array = array.try_into().expect("PROGRAMS is a program array");
        let loader = RefCell::new(Loader { ebpf, array, loaded: Vec::new() });
        Self { loader, ingress, egress, _array: fd }
    }

    /// What a device's hook runs. Behind it stand the programs of the frame's family, all of them from its first frame on:
    /// flows live for seconds, and what loading takes later would be time that passes for them.
    pub(super) fn entry(&self, hook: Hook, frame: &[u8]) -> &Entry {
        let mut loader = self.loader.borrow_mut();
        [INGRESS_STUB, EGRESS_STUB].into_iter().for_each(|stub| loader.load(stub));
        let mut slots = vec![program::INGRESS, program::EGRESS];
        if frame.get(12..14) == Some(&V4::ETHERTYPE.to_be_bytes()) {
            slots.extend([
                program::INGRESS_V4,
                program::EGRESS_V4,
                program::MASQUERADE_V4,
                program::ICMP_V4,
                program::MARK_V4,
            ]);
        }
        if frame.get(12..14) == Some(&V6::ETHERTYPE.to_be_bytes()) {
            slots.extend([
                program::INGRESS_V6,
                program::EGRESS_V6,
                program::MASQUERADE_V6,
                program::ICMP_V6,
                program::MARK_V6,
            ]);
        }
        slots.into_iter().for_each(|slot| loader.load_slot(slot));
        match hook {
            Hook::Ingress => &self.ingress,
            Hook::Egress => &self.egress,
        }
    }

    /// Loads every program of the object.
    pub(super) fn load_all(&self) {
        let mut loader = self.loader.borrow_mut();
        program::ALL.into_iter().chain([INGRESS_STUB, EGRESS_STUB]).for_each(|program| loader.load(program));
    }
}

impl Loader {
    fn load_slot(&mut self, slot: u32) {
        let program = program::ALL.into_iter().find(|(_, other)| *other == slot).expect("the slot has a program");
        self.load(program);
    }

    fn load(&mut self, (name, slot): (&str, u32)) {
        if self.loaded.contains(&slot) {
            return;
        }
        let program: &mut SchedClassifier = self
            .ebpf
            .program_mut(name)
            .unwrap_or_else(|| panic!("the object has no program {name}"))
            .try_into()
            .expect("a tc classifier");
        program.load().unwrap_or_else(|e| panic!("cannot load program {name}: {e}"));
        self.array.set(slot, program.fd().expect("loaded above"), 0).expect("PROGRAMS has this slot");
        self.loaded.push(slot);
    }
}
