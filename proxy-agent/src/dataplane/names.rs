//! `NAMES`, made by the agent itself: the object's type information calls its text bytes numbers, because Rust has no
//! type that debug information calls a character, and `bpftool` prints strings of characters only. No program uses the
//! map, so it can carry types of its own.

use std::io;

use proxy_common::abi::Name;

use super::load::Shape;
use super::pin::PinRoot;
use super::sys;

/// Makes and pins the map, if it is not there. `shape` is the object's, with the number of entries that is wanted.
pub(super) fn make(pins: &PinRoot, shape: &Shape) -> io::Result<()> {
    let path = pins.map("NAMES");
    if sys::open_pin(&path)?.is_some() {
        return Ok(());
    }
    let types = sys::load_types(&types())?;
    let map = sys::create_typed_map(c"NAMES", shape, &types, KEY, VALUE)?;
    sys::pin(&map, &path)
}

/// Type ids count from 1, in the order in which [`types`] writes them.
const KEY: u32 = 1;
const CHAR: u32 = 2;
const TEXT: u32 = 3;
const U8: u32 = 4;
const U16: u32 = 5;
const VALUE: u32 = 6;

const KIND_INT: u32 = 1 << 24;
const KIND_ARRAY: u32 = 3 << 24;
const KIND_STRUCT: u32 = 4 << 24;
/// Encoding of an INT that is a character.
const IS_CHAR: u32 = 2 << 24;

/// Type information in the kernel's format (Documentation/bpf/btf.rst).
#[derive(Default)]
struct Types {
    words: Vec<u32>,
    strings: Vec<u8>,
}

impl Types {
    fn name(&mut self, text: &str) -> u32 {
        // The string at offset 0 is the empty one.
        let offset = 1 + self.strings.len() as u32;
        self.strings.extend(text.bytes().chain([0]));
        offset
    }

    fn int(&mut self, name: &str, bytes: u32, encoding: u32) {
        let name = self.name(name);
        self.words.extend([name, KIND_INT, bytes, encoding | (bytes * 8)]);
    }

    fn member(&mut self, name: &str, kind: u32, offset: usize) {
        let name = self.name(name);
        self.words.extend([name, kind, offset as u32 * 8]);
    }

    fn bytes(&self) -> Vec<u8> {
        const MAGIC_AND_VERSION: u32 = 0x0001_eb9f;
        const HEADER: u32 = 24;
        let types = self.words.len() as u32 * 4;
        let strings = self.strings.len() as u32 + 1;
        let header = [MAGIC_AND_VERSION, HEADER, 0, types, types, strings];
        let mut bytes: Vec<u8> = header.iter().chain(&self.words).flat_map(|word| word.to_ne_bytes()).collect();
        bytes.push(0);
        bytes.extend(&self.strings);
        bytes
    }
}

fn types() -> Vec<u8> {
    let mut types = Types::default();
    types.int("u32", 4, 0);
    types.int("char", 1, IS_CHAR);
    let text = std::mem::offset_of!(Name, proto) - std::mem::offset_of!(Name, text);
    types.words.extend([0, KIND_ARRAY, 0, CHAR, KEY, text as u32]);
    types.int("u8", 1, 0);
    types.int("u16", 2, 0);
    const MEMBERS: u32 = 4;
    let name = types.name("Name");
    types.words.extend([name, KIND_STRUCT | MEMBERS, size_of::<Name>() as u32]);
    types.member("text", TEXT, std::mem::offset_of!(Name, text));
    types.member("proto", U8, std::mem::offset_of!(Name, proto));
    types.member("family", U8, std::mem::offset_of!(Name, family));
    types.member("_pad", U16, size_of::<Name>() - 2);
    types.bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_types_describe_the_whole_value() {
        let btf = aya_obj::btf::Btf::parse(&types(), object_endianness()).unwrap();
        let found = btf.id_by_type_name_kind("Name", aya_obj::btf::BtfKind::Struct).unwrap();
        assert_eq!(found, VALUE);
        assert_eq!(btf.id_by_type_name_kind("char", aya_obj::btf::BtfKind::Int).unwrap(), CHAR);
        assert_eq!(btf.id_by_type_name_kind("u8", aya_obj::btf::BtfKind::Int).unwrap(), U8);
    }

    fn object_endianness() -> aya::Endianness {
        aya::Endianness::default()
    }
}
