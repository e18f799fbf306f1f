package drivers

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/lima-vm/go-qcow2reader/image/parallels"
	"github.com/lima-vm/go-qcow2reader/image/stub"
	"github.com/lima-vm/go-qcow2reader/image/vdi"
	"github.com/lima-vm/go-qcow2reader/image/vhdx"
	"github.com/lima-vm/go-qcow2reader/image/vmdk"
	"github.com/lima-vm/go-qcow2reader/image/vpc"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

// foreign are the formats that are recognised in order to be refused by their
// name: taken for raw, they would be served as rubbish, and a guest could make
// of a raw disk an image that another program opens as one of them. They are
// those that QEMU recognises, under QEMU's names.
func foreign() []image.Format {
	return []image.Format{
		other("vmdk", "a VMDK image (VMware)", func(r io.ReaderAt) bool { return recognised(vmdk.Open, r) || vmdkDescriptor(r) }),
		other("vhdx", "a VHDX image (Hyper-V)", func(r io.ReaderAt) bool { return recognised(vhdx.Open, r) }),
		other("vpc", "a VHD image (Virtual PC)", func(r io.ReaderAt) bool { return recognised(vpc.Open, r) }),
		other("vdi", "a VDI image (VirtualBox)", func(r io.ReaderAt) bool { return recognised(vdi.Open, r) }, sizeAt(368, binary.LittleEndian)),
		other("parallels", "a Parallels image", func(r io.ReaderAt) bool { return recognised(parallels.Open, r) }),
		other("qed", "a QED image", magic("QED\x00"), sizeAt(48, binary.LittleEndian)),
		other("qcow", "a qcow image of version 1", magic("QFI\xfb\x00\x00\x00\x01"), sizeAt(24, binary.BigEndian)),
		other("luks", "a LUKS container", magic("LUKS\xba\xbe\x00\x01")),
		other("bochs", "a Bochs image", magic("Bochs Virtual HD Image\x00")),
		other("cloop", "a cloop image", magic("#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n")),
	}
}

// other is the row of a format that is known by name only, and perhaps by where
// it keeps the size of the disk.
func other(name, what string, probe func(io.ReaderAt) bool, sizes ...func(io.ReaderAt) int64) image.Format {
	refusal := fmt.Errorf("it is %s, a format that cannot be read here: %w", what, errors.ErrUnsupported)
	advice := "convert it with: qemu-img convert -f " + name + " -O qcow2 FILE NEW.qcow2"
	if name == "luks" {
		advice = "decrypt it with: qemu-img convert --object secret,id=key,file=PASSPHRASE --image-opts -O qcow2 driver=luks,key-secret=key,file.filename=FILE NEW.qcow2"
	}
	refuse := &image.Hint{Err: refusal, Advice: advice + "; or take its bytes as they are with -f raw"}
	f := image.Format{
		Name:     name,
		NameOnly: true,
		Probe:    func(r io.ReaderAt, _ int64) bool { return probe(r) },
	}
	confirm := func(s storage.Store) error {
		size, err := s.Size()
		if err != nil {
			return err
		}
		yes, err := f.Recognises(s, size)
		if err == nil && !yes && name == "vpc" {
			yes, err = fixedVHD(s, size)
		}
		if err == nil && !yes {
			err = image.ErrWrongFormat
		}
		return err
	}
	f.Open = func(_ context.Context, s storage.Store, _ image.Options) (image.Device, error) {
		if err := confirm(s); err != nil {
			return nil, err
		}
		return nil, refuse
	}
	f.Inspect = func(_ context.Context, s storage.Store, _ []image.Param) (*image.Inspection, error) {
		if err := confirm(s); err != nil {
			return nil, err
		}
		in := &image.Inspection{Format: name, VirtualSize: -1, Problem: refusal}
		for _, size := range sizes {
			in.VirtualSize = size(s)
		}
		return in, nil
	}
	return f
}

// fixedVHD knows a VHD of fixed size, which is a raw disk and a footer. It is not
// recognised, as it is not by QEMU: a guest could write the footer.
func fixedVHD(r io.ReaderAt, size int64) (bool, error) {
	const footer = 512
	if size < footer {
		return false, nil
	}
	b := make([]byte, 8)
	_, err := r.ReadAt(b, size-footer)
	return string(b) == "conectix", err
}

// sizeAt returns what reads the size of the disk in bytes, -1 if it cannot be.
func sizeAt(off int64, order binary.ByteOrder) func(io.ReaderAt) int64 {
	return func(r io.ReaderAt) int64 {
		var b [8]byte
		if n, _ := r.ReadAt(b[:], off); n < len(b) {
			return -1
		}
		return max(int64(order.Uint64(b[:])), -1)
	}
}

// recognised asks go-qcow2reader. Whatever it thinks of the bytes, it must not
// take the program down.
func recognised(open func(io.ReaderAt) (*stub.Stub, error), r io.ReaderAt) (yes bool) {
	defer func() {
		if recover() != nil {
			yes = false
		}
	}()
	_, err := open(r)
	return err == nil
}

func magic(m string) func(io.ReaderAt) bool {
	return func(r io.ReaderAt) bool {
		b := make([]byte, len(m))
		n, err := r.ReadAt(b, 0)
		return n == len(b) && (err == nil || errors.Is(err, io.EOF)) && string(b) == m
	}
}

// vmdkDescriptor recognises the text that names the extents of a VMDK disk,
// which may begin with any comment.
func vmdkDescriptor(r io.ReaderAt) bool {
	b := make([]byte, 2048)
	n, err := r.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return false
	}
	b = b[:n]
	for len(b) > 0 {
		line, rest, _ := bytes.Cut(b, []byte("\n"))
		if len(bytes.TrimSpace(line)) == 0 || line[0] == '#' {
			b = rest
			continue
		}
		version, ok := bytes.CutPrefix(line, []byte("version="))
		return ok && len(version) > 0 && '1' <= version[0] && version[0] <= '3'
	}
	return false
}
