//! Slots for endpoints that left their runs and still serve: no word names them, but an agent that starts anew finds in
//! them which endpoint has which id, and leaves its flows alone (rule 105).

use proxy_common::abi::Run;

use super::batch::Batch;
use super::port::{Contents, HeldEndpoint, Means, SlotRef};
use crate::dataplane::{Free, MapOp, Slot};
use crate::model::IpFamily;

/// The parked endpoints of one port.
#[derive(Debug, Default)]
pub(super) struct Parked {
    current: Contents,
    next: Option<Contents>,
}

impl Parked {
    /// Parks these and no others. Where no slots are left they go without: only a restart would miss them.
    pub(super) fn change<'a>(
        &mut self,
        endpoints: impl Iterator<Item = &'a HeldEndpoint> + Clone,
        owner: u32,
        family: IpFamily,
        means: &mut Means<'_>,
        batch: &mut Batch,
    ) {
        let of = |endpoint: &HeldEndpoint| SlotRef { id: endpoint.id, generation: endpoint.generation, flags: 0 };
        let slots: Vec<_> = endpoints.clone().map(of).collect();
        if self.current.slots == slots {
            return;
        }
        let len = slots.len() as u32;
        let base = Some(len).filter(|len| *len <= Run::MAX_LEN).and_then(|len| means.ids.slots(family).allocate(len));
        let next = base.map_or_else(Contents::default, |base| Contents { run: Run::new(base, len, 0), slots });
        for (index, (endpoint, slot)) in (next.run.base()..).zip(endpoints.zip(&next.slots)) {
            let (addr, port) = (endpoint.addr, endpoint.port);
            let (endpoint_id, endpoint_gen) = (slot.id, slot.generation);
            let slot = Slot { addr, port, flags: slot.flags, endpoint_id, endpoint_gen, owner };
            batch.hidden.push(MapOp::PutSlot { index, slot });
        }
        self.retire(family, batch);
        self.next = Some(next);
    }

    /// The slots go.
    pub(super) fn retire(&self, family: IpFamily, batch: &mut Batch) {
        batch.retire_slots(family, self.current.run.base(), self.current.run.len());
    }

    /// The change is done.
    pub(super) fn finish(&mut self) {
        self.current = self.next.take().unwrap_or_else(|| std::mem::take(&mut self.current));
    }

    /// The change failed: what it took is free at once.
    pub(super) fn abort(&mut self, family: IpFamily) -> Option<Free> {
        let run = self.next.take()?.run;
        Some(Free::Slots { family, base: run.base(), len: run.len() })
    }
}
