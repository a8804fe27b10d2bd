//! Internal snapshots: their table, and what is done with them, against QEMU.

mod qemu;

use std::sync::Arc;

use qcow2::format::Header;
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::{Blocking, Storage};
use qcow2::tables::file::HostFile;
use qcow2::tables::snapshots::SnapshotTable;
use qcow2::wait::block_on;
use qcow2::{Error, Result};

fn load(bytes: Vec<u8>) -> Result<SnapshotTable> {
    let header = Header::parse(&bytes).unwrap();
    let file = HostFile::new(Arc::new(MemoryStorage::new(bytes)) as Arc<dyn Storage>);
    block_on(SnapshotTable::load(&Blocking, &file, header.snapshots_offset, header.snapshots))
}

#[test]
fn tables_that_qemu_wrote_are_read_and_written_byte_for_byte() {
    let Some(dir) = qemu::dir("snapshot-table") else { return };
    for options in ["compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=2M,extended_l2=on"] {
        let path = dir.path("table.qcow2");
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", options, &path, "3M"]);
        let names: Vec<String> = (0..17).map(|n| "name-\u{e9}".repeat(n * 2)).collect();
        for name in &names {
            qemu::img(&["snapshot", "-c", name, &path]);
        }
        qemu::img(&["snapshot", "-d", &names[3], &path]);
        let bytes = std::fs::read(&path).unwrap();
        let table = load(bytes.clone()).unwrap();
        assert_eq!(table.snapshots.len(), 16, "{options}");
        for (n, s) in (0..17usize).filter(|n| *n != 3).zip(&table.snapshots) {
            let name = &names[n].as_bytes()[..names[n].len().min(255)];
            assert_eq!((&s.id[..], &s.name[..]), ((n + 1).to_string().as_bytes(), name), "{options}");
            assert_eq!((s.disk_bytes(), s.vm_state_bytes(), s.icount()), (Some(3 << 20), 0, Some(0)), "{options}");
        }
        let stored = &bytes[table.offset.0 as usize..][..table.bytes as usize];
        assert_eq!(table.encode().unwrap(), stored, "{options}");
    }
}

#[test]
fn tables_that_lie_are_refused_by_name() {
    let Some(dir) = qemu::dir("snapshot-table-bad") else { return };
    let path = dir.path("table.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &path, "3M"]);
    for name in ["a", "b"] {
        qemu::img(&["snapshot", "-c", name, &path]);
    }
    let good = std::fs::read(&path).unwrap();
    let at = load(good.clone()).unwrap().offset.0 as usize;
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        load(bytes)
    };
    let field_of = |result: Result<SnapshotTable>| match result {
        Err(Error::SnapshotTable { entry, field, .. }) => (entry, field),
        other => panic!("{other:?}"),
    };
    let put = |bytes: &mut Vec<u8>, at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    assert_eq!(field_of(with(&|b| put(b, at + 36, 1025))), (0, "extra_data_size"));
    // One entry more than there are: zeroes follow, which make an empty entry, up to the end of the file.
    let extended = with(&|b| {
        put(b, 60, 3);
        b.resize(good.len() + 64, 0);
    });
    let geometry = Header::parse(&good).unwrap().geometry;
    assert!(extended.unwrap().snapshots[2].check_l1(2, geometry, 3 << 20, good.len() as u64).is_err());
    assert_eq!(field_of(with(&|b| put(b, 60, 65536))).1, "offset");
    // An entry whose name reaches past the end of the file.
    assert_eq!(field_of(with(&|b| b[at + 12..at + 16].fill(0xff))).1, "offset");
    assert_eq!(field_of(with(&|b| b.truncate(at + 39))), (0, "offset"));
    let half = with(&|b| b.truncate(at + 66)).map(|_| ());
    assert!(matches!(half, Err(Error::SnapshotTable { entry: 1, .. })), "{half:?}");
}
