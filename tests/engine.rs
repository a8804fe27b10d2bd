//! The engine end to end, small: what a first user tries.

use std::path::{Path, PathBuf};
use std::process::Command;

use qcow2::image::{BackingPolicy, Image, MapKind, OpenOptions};

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let base = if Path::new("/dev/shm").is_dir() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
        let dir = base.join(format!("libqcow2-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn have_qemu() -> bool {
    let have = Command::new("qemu-img").arg("--version").output().is_ok();
    if !have {
        assert!(std::env::var_os("CI").is_none(), "qemu-img is needed in CI");
        eprintln!("SKIPPED: qemu-img is not installed");
    }
    have
}

fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {args:?}: {text}");
    text
}

#[test]
fn an_overlay_is_written_read_flushed_and_found_in_order_by_qemu() {
    if !have_qemu() {
        return;
    }
    let dir = Dir::new("engine-overlay");
    let (base, top) = (dir.path("base.raw"), dir.path("top.qcow2"));
    let size = 8u64 << 20;
    let mut expected: Vec<u8> = (0..size).map(|i| (i / 512 % 251) as u8).collect();
    std::fs::write(&base, &expected).unwrap();
    let top_name = top.to_str().unwrap();
    let options = "extended_l2=on,cluster_size=64k,backing_file=base.raw,backing_fmt=raw";
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, top_name]);
    assert!(Image::open(&top, &OpenOptions::default()).is_err(), "backing files are denied by default");
    let options = OpenOptions { backing: BackingPolicy::Relative, ..Default::default() };
    let image = Image::open(&top, &options).unwrap();
    assert_eq!(image.size(), size);
    for i in 0..300u64 {
        let at = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (size - 200_000);
        let length = 1 + (i * 7919 % 150_000) as usize;
        let payload = vec![i as u8; length];
        image.pwrite(&payload, at).unwrap();
        expected[at as usize..at as usize + length].copy_from_slice(&payload);
    }
    let mut seen = vec![0; size as usize];
    image.pread(&mut seen, 0).unwrap();
    assert!(seen == expected);
    image.flush().unwrap();
    assert_eq!(image.map(qcow2::format::GuestOffset(0), 512).unwrap().kind, MapKind::Data);
    image.close().unwrap();
    run("qemu-img", &["check", "-q", top_name]);
    let raw = dir.path("expected.raw");
    std::fs::write(&raw, &expected).unwrap();
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", top_name, raw.to_str().unwrap()]);
}
