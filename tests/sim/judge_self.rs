//! The judge itself: it agrees with qemu-img on good images, and it finds each kind of damage.

use crate::judge::layout::Place;
use crate::judge::{Judge, Layout};
use crate::qemu;
use qcow2::storage::sim::DiskImage;

fn verdict(bytes: &[u8]) -> Vec<String> {
    Judge::default().judge(&DiskImage::new(bytes)).violations
}

/// 1 MiB, 64 KiB clusters, with one snapshot, data after it, and a compressed cluster.
fn sample(dir: &qemu::Dir, options: &str) -> Vec<u8> {
    let path = dir.path("sample.qcow2");
    qemu::img(&["create", "-f", "qcow2", "-o", options, &path, "1M"]);
    qemu::io(&path, &["write -P 1 0 128k", "write -P 2 256k 4k", "write -c -P 3 512k 64k"]);
    qemu::img(&["snapshot", "-c", "one", &path]);
    qemu::io(&path, &["write -P 4 64k 8k", "write -P 5 640k 1k"]);
    std::fs::read(&path).unwrap()
}

#[test]
fn good_images_pass_and_read_what_was_written() {
    let Some(dir) = qemu::dir("judge-good") else { return };
    for options in ["cluster_size=64k", "cluster_size=64k,extended_l2=on", "cluster_size=64k,refcount_bits=64"] {
        let image = DiskImage::new(sample(&dir, options));
        let verdict = Judge::default().judge(&image);
        assert_eq!((verdict.violations, verdict.leaks), (vec![], 0), "{options}");
        let layout = Layout::parse(&image).unwrap();
        let read = |tree, sector| {
            let mut out = [0; 512];
            layout.read(tree, sector, &mut out).unwrap().map(|()| out[511])
        };
        assert_eq!([0, 128, 144, 512, 1024, 1280].map(|s| read(0, s)), [1, 4, 1, 2, 3, 5].map(Some));
        assert_eq!([0, 128, 144, 512, 1024].map(|s| read(1, s)), [1, 1, 1, 2, 3].map(Some));
        assert_eq!((read(1, 1280), read(0, 300), read(0, 1900)), (None, None, None));
    }
}

#[test]
fn each_kind_of_damage_is_named() {
    let Some(dir) = qemu::dir("judge-bad") else { return };
    let good = sample(&dir, "cluster_size=64k,extended_l2=on");
    let image = DiskImage::new(good.clone());
    let layout = Layout::parse(&image).unwrap();
    let table = layout.u64(layout.l1_offset) & !(1 << 63);
    let Place::Host(host) = layout.place(0, 1280) else { panic!("guest sector 1280 was written") };
    let (entry_10, entry_1) = ((table + 160) as usize, (table + 16) as usize);
    let word = |bytes: &mut Vec<u8>, at: usize, value: u64| bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    let block = layout.u64(layout.refcount_table_offset) as usize;
    let expect = |rule: &str, damage: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        damage(&mut bytes);
        let found = verdict(&bytes);
        assert!(found.iter().any(|v| v.starts_with(rule)), "{rule}: {found:?}");
    };
    expect("D1", &|b| b[0] = 0);
    expect("D2", &|b| word(b, entry_10, 1 << 63 | 1 << 40));
    expect("D2", &|b| word(b, entry_10, (1 << 63) | (host * 512 + 512)));
    expect("D3", &|b| b[block + (host as usize / 128) * 2 + 1] = 0);
    expect("D4", &|b| {
        let shared = layout.u64(table);
        word(b, table as usize, shared | 1 << 63);
    });
    expect("D5", &|b| {
        let first = layout.u64(entry_1 as u64);
        word(b, entry_10, first);
    });
    expect("D5", &|b| word(b, entry_10, 1 << 63 | table));
    expect("D6", &|b| word(b, entry_10 + 8, 1 << 32 | 1));
    expect("D6", &|b| word(b, entry_10, 0));
    expect("D6", &|b| b[entry_10 + 7] = 2);
}

#[test]
fn leaks_are_counted_and_are_no_violation() {
    let Some(dir) = qemu::dir("judge-leak") else { return };
    let mut bytes = sample(&dir, "cluster_size=64k");
    let image = DiskImage::new(bytes.clone());
    let layout = Layout::parse(&image).unwrap();
    let block = layout.u64(layout.refcount_table_offset) as usize;
    bytes[block + 2001] = 1;
    let verdict = Judge::default().judge(&DiskImage::new(bytes));
    assert_eq!((verdict.violations, verdict.leaks), (vec![], 1));
}
