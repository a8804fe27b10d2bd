//! The snapshot table. Spec, "Snapshots".
//!
//! Entries have no fixed length, so that the length of a table is only known once each of them has been read:
//! [`Snapshot::parse`] says how many bytes it still lacks. What is not known of an entry (extra data of a later
//! version, strings that are no text) is kept byte for byte, and written back as it was.

use super::geometry::Geometry;
use super::header::L1_ENTRIES_MAX;
pub use super::header::SNAPSHOTS_MAX;
use super::layout::{Field, at};
use super::units::HostOffset;
use crate::error::{Error, Result};

/// Largest snapshot table (as QEMU: 1 KiB for each of the most snapshots).
pub const TABLE_BYTES_MAX: u64 = 1024 * SNAPSHOTS_MAX as u64;
/// Most extra data of an entry (as QEMU).
pub const EXTRA_BYTES_MAX: u64 = 1024;
/// Longest id and name of snapshots that are made here: what QEMU shows, and finds again.
pub const ID_BYTES_MAX: usize = 127;
/// See [`ID_BYTES_MAX`].
pub const NAME_BYTES_MAX: usize = 255;
/// An entry without its strings and extra data.
pub const ENTRY_BYTES_MIN: usize = 40;

const L1_TABLE_OFFSET: Field = at(0, 8, "l1_table_offset");
const L1_SIZE: Field = at(8, 4, "l1_size");
const ID_STR_SIZE: Field = at(12, 2, "id_str_size");
const NAME_SIZE: Field = at(14, 2, "name_size");
const DATE_SEC: Field = at(16, 4, "date_sec");
const DATE_NSEC: Field = at(20, 4, "date_nsec");
const VM_CLOCK_NSEC: Field = at(24, 8, "vm_clock_nsec");
const VM_STATE_SIZE: Field = at(32, 4, "vm_state_size");
const EXTRA_DATA_SIZE: Field = at(36, 4, "extra_data_size");
// Extra data: only there if extra_data_size reaches past them.
const VM_STATE_SIZE_LARGE: Field = at(40, 8, "vm_state_size (64 bits)");
const DISK_SIZE: Field = at(48, 8, "virtual disk size");
const ICOUNT: Field = at(56, 8, "icount");

/// The fields of an entry, in their order on disk.
pub const ENTRY_FIELDS: [Field; 12] = [
    L1_TABLE_OFFSET,
    L1_SIZE,
    ID_STR_SIZE,
    NAME_SIZE,
    DATE_SEC,
    DATE_NSEC,
    VM_CLOCK_NSEC,
    VM_STATE_SIZE,
    EXTRA_DATA_SIZE,
    VM_STATE_SIZE_LARGE,
    DISK_SIZE,
    ICOUNT,
];

const _: () = {
    let (mut i, mut end) = (0, 0);
    while i < ENTRY_FIELDS.len() {
        assert!(ENTRY_FIELDS[i].offset == end, "a field leaves a gap or overlaps");
        end += ENTRY_FIELDS[i].bytes;
        i += 1;
    }
    assert!(EXTRA_DATA_SIZE.offset + EXTRA_DATA_SIZE.bytes == ENTRY_BYTES_MIN);
};

/// One entry of the snapshot table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its L1 table.
    pub l1_offset: HostOffset,
    /// Entries of that.
    pub l1_entries: u32,
    /// When it was taken: seconds since the Epoch.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// How long the guest had been running, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Size of the VM state in the old, 32-bit field; see [`Snapshot::vm_state_bytes`].
    pub vm_state_size: u32,
    /// Extra data, of which the first fields are known.
    pub extra: Vec<u8>,
    /// Id: a decimal number, if the snapshot was made here or by QEMU.
    pub id: Vec<u8>,
    /// Name; not necessarily unique.
    pub name: Vec<u8>,
}

/// What the start of some bytes is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parsed {
    /// An entry, and where the next one begins, its padding included.
    Entry(Snapshot, usize),
    /// The beginning of an entry: at least this many bytes are needed to tell more.
    Short(usize),
}

fn wrong<T>(entry: u32, field: Field, value: u64, expected: &'static str) -> Result<T> {
    Err(Error::SnapshotTable { entry, field: field.name, value, expected })
}

impl Snapshot {
    /// Reads the entry that `bytes` begin with; `entry` is its index, for errors. Checks what has to be right for the
    /// rest of the table to be found; [`Snapshot::check_l1`] checks what has to be right for the snapshot to be used.
    pub fn parse(bytes: &[u8], entry: u32) -> Result<Parsed> {
        if bytes.len() < ENTRY_BYTES_MIN {
            return Ok(Parsed::Short(ENTRY_BYTES_MIN));
        }
        let extra = EXTRA_DATA_SIZE.get(bytes);
        if extra > EXTRA_BYTES_MAX {
            return wrong(entry, EXTRA_DATA_SIZE, extra, "at most 1024");
        }
        let id_at = ENTRY_BYTES_MIN + extra as usize;
        let name_at = id_at + ID_STR_SIZE.get(bytes) as usize;
        let end = name_at + NAME_SIZE.get(bytes) as usize;
        if bytes.len() < end {
            return Ok(Parsed::Short(end));
        }
        let snapshot = Self {
            l1_offset: HostOffset(L1_TABLE_OFFSET.get(bytes)),
            l1_entries: L1_SIZE.get(bytes) as u32,
            date_sec: DATE_SEC.get(bytes) as u32,
            date_nsec: DATE_NSEC.get(bytes) as u32,
            vm_clock_nsec: VM_CLOCK_NSEC.get(bytes),
            vm_state_size: VM_STATE_SIZE.get(bytes) as u32,
            extra: bytes[ENTRY_BYTES_MIN..id_at].to_vec(),
            id: bytes[id_at..name_at].to_vec(),
            name: bytes[name_at..end].to_vec(),
        };
        Ok(Parsed::Entry(snapshot, end.next_multiple_of(8)))
    }

    /// Appends the entry to a table, with its padding.
    pub fn encode(&self, table: &mut Vec<u8>) -> Result<()> {
        let too_long = |what| Error::TooLarge { what, limit: u64::from(u16::MAX) };
        let id_bytes = u16::try_from(self.id.len()).map_err(|_| too_long("the id of a snapshot"))?;
        let name_bytes = u16::try_from(self.name.len()).map_err(|_| too_long("the name of a snapshot"))?;
        if self.extra.len() as u64 > EXTRA_BYTES_MAX {
            return Err(Error::TooLarge { what: "the extra data of a snapshot", limit: EXTRA_BYTES_MAX });
        }
        let mut fixed = [0; ENTRY_BYTES_MIN];
        L1_TABLE_OFFSET.set(&mut fixed, self.l1_offset.0);
        L1_SIZE.set(&mut fixed, self.l1_entries.into());
        ID_STR_SIZE.set(&mut fixed, id_bytes.into());
        NAME_SIZE.set(&mut fixed, name_bytes.into());
        DATE_SEC.set(&mut fixed, self.date_sec.into());
        DATE_NSEC.set(&mut fixed, self.date_nsec.into());
        VM_CLOCK_NSEC.set(&mut fixed, self.vm_clock_nsec);
        VM_STATE_SIZE.set(&mut fixed, self.vm_state_size.into());
        EXTRA_DATA_SIZE.set(&mut fixed, self.extra.len() as u64);
        for part in [&fixed[..], &self.extra, &self.id, &self.name] {
            table.extend_from_slice(part);
        }
        table.resize(table.len().next_multiple_of(8), 0);
        Ok(())
    }

    /// Extra data of new snapshots: no VM state, the size of the disk, and no icount.
    pub fn new_extra(disk_bytes: u64) -> Vec<u8> {
        [0, disk_bytes, u64::MAX].map(u64::to_be_bytes).concat()
    }

    fn extra_field(&self, field: Field) -> Option<u64> {
        let field = Field { offset: field.offset - ENTRY_BYTES_MIN, ..field };
        (self.extra.len() >= field.offset + field.bytes).then(|| field.get(&self.extra))
    }

    /// Size of the VM state, which lies past the end of the disk; 0 if there is none.
    pub fn vm_state_bytes(&self) -> u64 {
        self.extra_field(VM_STATE_SIZE_LARGE).unwrap_or(u64::from(self.vm_state_size))
    }

    /// Size of the disk, where the entry tells; otherwise it is what it is now.
    pub fn disk_bytes(&self) -> Option<u64> {
        self.extra_field(DISK_SIZE)
    }

    /// Instruction count of record and replay, where there is one.
    pub fn icount(&self) -> Option<u64> {
        self.extra_field(ICOUNT).filter(|&icount| icount != u64::MAX)
    }

    /// Checks what has to be right for the snapshot to be used: that its L1 table lies inside the file, apart from the
    /// header, and maps the disk. `size_now` is the size of the disk now. Returns the snapshot's size of the disk.
    pub fn check_l1(&self, entry: u32, geometry: Geometry, size_now: u64, file_size: u64) -> Result<u64> {
        let (at, entries) = (self.l1_offset.0, u64::from(self.l1_entries));
        if entries > L1_ENTRIES_MAX {
            return wrong(entry, L1_SIZE, entries, "at most 4194304 (an L1 table of 32 MiB)");
        }
        let (size, size_field) = (self.disk_bytes().unwrap_or(size_now), DISK_SIZE);
        let needed = geometry.l1_entries_for(size);
        if needed > L1_ENTRIES_MAX {
            return wrong(entry, size_field, size, "a size that an L1 table of 32 MiB can map at this cluster size");
        }
        if entries < needed {
            return wrong(entry, L1_SIZE, entries, "enough entries to map the size of the disk");
        }
        if entries == 0 {
            return Ok(size);
        }
        if at == 0 || !at.is_multiple_of(geometry.cluster_size_bytes()) {
            return wrong(entry, L1_TABLE_OFFSET, at, "a multiple of the cluster size other than 0");
        }
        if at.checked_add(entries * 8).is_none_or(|end| end > file_size) {
            return wrong(entry, L1_TABLE_OFFSET, at, "an L1 table that ends inside the file");
        }
        Ok(size)
    }
}

/// Writes a table.
pub fn encode_table(snapshots: &[Snapshot]) -> Result<Vec<u8>> {
    if snapshots.len() > SNAPSHOTS_MAX as usize {
        return Err(Error::TooLarge { what: "the number of snapshots", limit: SNAPSHOTS_MAX.into() });
    }
    let mut table = Vec::new();
    for snapshot in snapshots {
        snapshot.encode(&mut table)?;
    }
    if table.len() as u64 > TABLE_BYTES_MAX {
        return Err(Error::TooLarge { what: "the snapshot table", limit: TABLE_BYTES_MAX });
    }
    Ok(table)
}

/// The snapshot that a caller means: by its id, or else the first one of that name, as `qemu-img snapshot -a` looks.
pub fn find(snapshots: &[Snapshot], id_or_name: &[u8]) -> Option<usize> {
    let by_id = snapshots.iter().position(|s| s.id == id_or_name);
    by_id.or_else(|| snapshots.iter().position(|s| s.name == id_or_name))
}

/// The id of the next snapshot: one more than the largest so far. Ids that are no numbers count as what number they
/// begin with.
pub fn next_id(snapshots: &[Snapshot]) -> Vec<u8> {
    let number = |id: &[u8]| {
        let digits = id.iter().take_while(|byte| byte.is_ascii_digit());
        digits.fold(0u64, |number, digit| number.saturating_mul(10).saturating_add(u64::from(digit - b'0')))
    };
    let used: Vec<u64> = snapshots.iter().map(|s| number(&s.id)).collect();
    let after = used.iter().max().map_or(Some(1), |last| last.checked_add(1));
    // Nobody makes 2^64 snapshots, but anybody can write that number into a file: then any that is free.
    let free = || (1..).find(|n| !used.contains(n)).unwrap_or(1);
    after.unwrap_or_else(free).to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: Geometry = Geometry { version: 3, cluster_bits: 16, extended_l2: false, refcount_order: 4 };

    fn sample(id: &str, name: &str, extra: &[u8]) -> Snapshot {
        Snapshot {
            l1_offset: HostOffset(0x50000),
            l1_entries: 7,
            date_sec: 0x8123_4567,
            date_nsec: 999_999_999,
            vm_clock_nsec: u64::MAX,
            vm_state_size: 3,
            extra: extra.to_vec(),
            id: id.into(),
            name: name.into(),
        }
    }

    #[test]
    fn entries_survive_whatever_their_lengths() {
        for length in [0, 1, 7, 8, 15, 16, 23, 24, 31, 1024] {
            let extra: Vec<u8> = (0..length).map(|i| (i * 7 + 1) as u8).collect();
            for (id, name) in [("1", "first"), ("", ""), ("12345678", "x")] {
                let before = sample(id, name, &extra);
                let mut bytes = Vec::new();
                before.encode(&mut bytes).unwrap();
                assert!(bytes.len().is_multiple_of(8));
                assert_eq!(Snapshot::parse(&bytes, 0), Ok(Parsed::Entry(before.clone(), bytes.len())));
                let end = ENTRY_BYTES_MIN + length + id.len() + name.len();
                assert_eq!(Snapshot::parse(&bytes[..39], 0), Ok(Parsed::Short(40)));
                if end > ENTRY_BYTES_MIN {
                    assert_eq!(Snapshot::parse(&bytes[..end - 1], 0), Ok(Parsed::Short(end)));
                }
                // The padding of the last entry may be missing.
                assert!(matches!(Snapshot::parse(&bytes[..end], 0), Ok(Parsed::Entry(..))));
            }
        }
    }

    #[test]
    fn known_extra_data_counts_as_far_as_it_goes() {
        let known: Vec<u8> = [5u64 << 32, 10 << 20, 77].map(u64::to_be_bytes).concat();
        let facts = |n: usize| {
            let s = sample("1", "n", &known[..n]);
            (s.vm_state_bytes(), s.disk_bytes(), s.icount())
        };
        assert_eq!(facts(7), (3, None, None), "a field that is there in part is not there");
        assert_eq!(facts(8), (5 << 32, None, None));
        assert_eq!(facts(16), (5 << 32, Some(10 << 20), None));
        assert_eq!(facts(24), (5 << 32, Some(10 << 20), Some(77)));
        let new = sample("1", "n", &Snapshot::new_extra(512));
        assert_eq!((new.vm_state_bytes(), new.disk_bytes(), new.icount()), (0, Some(512), None));
    }

    #[test]
    fn what_is_wrong_has_its_name() {
        let mut bytes = Vec::new();
        sample("1", "n", &[]).encode(&mut bytes).unwrap();
        bytes[36..40].copy_from_slice(&1025u32.to_be_bytes());
        let field_of = |e: Result<u64>| match e {
            Err(Error::SnapshotTable { entry: 4, field, .. }) => field,
            other => panic!("{other:?}"),
        };
        let error = Snapshot::parse(&bytes, 4).unwrap_err();
        assert_eq!(field_of(Err(error)), "extra_data_size");
        let check = |change: fn(&mut Snapshot)| {
            let mut s = sample("1", "n", &Snapshot::new_extra(7 << 29));
            change(&mut s);
            s.check_l1(4, G, 0, 0x50000 + 56)
        };
        assert_eq!(check(|_| ()), Ok(7 << 29));
        assert_eq!(field_of(check(|s| s.l1_entries = u32::MAX)), "l1_size");
        assert_eq!(field_of(check(|s| s.l1_entries = 6)), "l1_size");
        assert_eq!(field_of(check(|s| s.l1_entries = 8)), "l1_table_offset");
        assert_eq!(field_of(check(|s| s.l1_offset = HostOffset(0))), "l1_table_offset");
        assert_eq!(field_of(check(|s| s.l1_offset = HostOffset(0x50200))), "l1_table_offset");
        assert_eq!(field_of(check(|s| s.l1_offset = HostOffset(u64::MAX << 16))), "l1_table_offset");
        assert_eq!(field_of(check(|s| s.extra = Snapshot::new_extra(u64::MAX))), "virtual disk size");
        let empty = |s: &mut Snapshot| (s.l1_entries, s.l1_offset, s.extra) = (0, HostOffset(0), vec![0; 16]);
        assert_eq!(check(empty), Ok(0), "a disk of no bytes needs no table");
    }

    #[test]
    fn snapshots_are_found_by_id_and_then_by_name() {
        let list = [sample("1", "3", &[]), sample("2", "a", &[]), sample("3", "a", &[])];
        assert_eq!(find(&list, b"3"), Some(2), "an id goes before a name");
        assert_eq!(find(&list, b"a"), Some(1), "the first of that name");
        assert_eq!(find(&list, b"4"), None);
    }

    #[test]
    fn the_next_id_is_one_more_than_the_largest() {
        let next = |ids: &[&str]| {
            let list: Vec<Snapshot> = ids.iter().map(|id| sample(id, "", &[])).collect();
            String::from_utf8(next_id(&list)).unwrap()
        };
        assert_eq!(next(&[]), "1");
        assert_eq!(next(&["1", "9", "2"]), "10");
        assert_eq!(next(&["x", "12b"]), "13");
        assert_eq!(next(&["18446744073709551615", "1"]), "2");
        assert_eq!(next(&["99999999999999999999999"]), "1");
    }

    #[test]
    fn tables_have_limits() {
        let few = vec![sample("1", "n", &[0; 900]); 60000];
        assert!(encode_table(&few).is_ok());
        assert!(matches!(encode_table(&vec![sample("1", "n", &[]); 65537]), Err(Error::TooLarge { .. })));
        let large = vec![sample("1", &"n".repeat(1000), &[]); 65536];
        assert!(matches!(encode_table(&large), Err(Error::TooLarge { what: "the snapshot table", .. })));
        assert!(sample("1", &"n".repeat(65536), &[]).encode(&mut Vec::new()).is_err());
        assert!(sample("1", "", &[0; 1025]).encode(&mut Vec::new()).is_err());
    }
}
