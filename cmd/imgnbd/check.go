package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/pflag"

	"github.com/imgnbd/imgnbd/image"
)

// Exit statuses of check, which are qemu-img's.
const (
	exitCorrupt     = 2
	exitLeaks       = 3
	exitUnsupported = 63
)

// checkCommand verifies the structure of an image, in qemu-img's words.
func checkCommand() *command {
	c := newCommand("check")
	var o imageOptions
	var form outputForm
	var quiet, progress bool
	o.addFormat(c.flags)
	o.addImageOpts(c.flags)
	form.add(c.flags)
	c.flags.BoolVarP(&quiet, "quiet", "q", false, "")
	c.flags.BoolVarP(&progress, "progress", "p", false, "")
	o.addForceShare(c.flags)
	o.addBacking(c.flags)
	var repair image.Repair
	var journal journalMode
	value(c.flags, "journal", "", func(s string) error {
		if s == "on" || s == "off" {
			return errors.New("--journal of check is a directory")
		}
		return journal.set(s)
	})
	value(c.flags, "repair", "r", func(s string) error {
		switch s {
		case "leaks":
			repair = image.RepairLeaks
		case "all":
			repair = image.RepairAll
		default:
			return says("Unknown option value for -r (expecting 'leaks' or 'all'): %s", s)
		}
		return nil
	})
	c.run = func(u *ui, operands []string) (err error) {
		file, err := oneImage(operands)
		if err != nil {
			return err
		}
		t, err := o.target(file, c.flags.Changed("format"), imgWords)
		if err != nil {
			return err
		}
		if repair != image.RepairNothing && o.forceShare {
			return t.failed(says("force-share=on can only be used with read-only images"))
		}
		t.share = t.share && repair == image.RepairNothing
		chain := o.chain(u)
		if journal.dir != "" {
			chain.Journals = journal.journals(u, true)
		}
		what := image.CheckOptions{
			Repair: repair,
			// To qemu-img these are no results.
			Report: func(f image.Finding) { u.bare(f.Text) },
		}
		check := func() (image.CheckResult, string, error) {
			if progress && !quiet {
				shown := progressOf(u)
				what.Progress = shown.show
				defer shown.end()
			}
			return t.check(chain, what)
		}
		res, format, err := check()
		if err == nil && res.CorruptionsFixed+res.LeaksFixed > 0 {
			if !quiet && !form.json {
				u.printf("The following inconsistencies were found and repaired:\n\n"+
					"    %d leaked clusters\n    %d corruptions\n\nDouble checking the fixed image now...\n", res.LeaksFixed, res.CorruptionsFixed)
			}
			corruptions, leaks := res.CorruptionsFixed, res.LeaksFixed
			what.Repair = image.RepairNothing
			res, format, err = check()
			res.CorruptionsFixed, res.LeaksFixed = corruptions, leaks
		}
		if err != nil {
			return err
		}
		switch {
		case quiet:
		case form.json:
			err = u.json(newCheckJSON(t, format, &res))
		default:
			u.printf("%s", checkText(&res))
		}
		if err != nil {
			return err
		}
		return checkExit(&res)
	}
	return c
}

// A progress shows how much is done, as qemu-img convert -p does.
type progress struct {
	u    *ui
	last int64 // hundredths of a percent
}

func progressOf(u *ui) *progress { return &progress{u, -1} }

func (p *progress) show(done, total int64) {
	const whole = 10000
	now := int64(whole)
	if total > 0 {
		now = int64(float64(min(done, total)) / float64(total) * whole)
	}
	if now != p.last {
		p.last = now
		fmt.Fprintf(p.u.stderr, "    (%d.%02d/100%%)\r", now/100, now%100)
	}
}

func (p *progress) end() { fmt.Fprintln(p.u.stderr) }

// check checks the image once.
func (t *target) check(c *image.Chain, what image.CheckOptions) (image.CheckResult, string, error) {
	res, format, err := c.Check(context.Background(), t.name, t.opt, what)
	at, ok := errors.AsType[*image.Error](err)
	switch {
	case errors.Is(err, image.ErrNoCheck):
		err = &exit{exitUnsupported, says("This image format does not support checks")}
	case ok && at.Op == "open":
		err = t.failed(err)
	case err != nil:
		err = says("Check failed: %s", strerror(err))
	}
	return res, format, err
}

func checkExit(res *image.CheckResult) error {
	switch {
	case res.CheckErrors > 0:
		return says("Check failed")
	case res.Corruptions > 0:
		return &exit{code: exitCorrupt}
	case res.Leaks > 0:
		return &exit{code: exitLeaks}
	}
	return nil
}

// The fields are in qemu-img's order, that of a hash table. What is zero is
// left out but for the errors.
type checkJSON struct {
	ImageEndOffset     int64  `json:"image-end-offset,omitempty"`
	CompressedClusters int64  `json:"compressed-clusters,omitempty"`
	TotalClusters      int64  `json:"total-clusters,omitempty"`
	Corruptions        int64  `json:"corruptions,omitempty"`
	CorruptionsFixed   int64  `json:"corruptions-fixed,omitempty"`
	CheckErrors        int64  `json:"check-errors"`
	LeaksFixed         int64  `json:"leaks-fixed,omitempty"`
	Leaks              int64  `json:"leaks,omitempty"`
	AllocatedClusters  int64  `json:"allocated-clusters,omitempty"`
	Filename           string `json:"filename"`
	Format             string `json:"format"`
	FragmentedClusters int64  `json:"fragmented-clusters,omitempty"`
}

func newCheckJSON(t *target, format string, r *image.CheckResult) checkJSON {
	return checkJSON{
		r.ImageEndOffset, r.CompressedClusters, r.TotalClusters, r.Corruptions, r.CorruptionsFixed, r.CheckErrors, r.LeaksFixed, r.Leaks,
		r.AllocatedClusters, t.given, format, r.FragmentedClusters,
	}
}

// checkText sums up for people.
func checkText(r *image.CheckResult) string {
	var b strings.Builder
	if r.Corruptions == 0 && r.Leaks == 0 && r.CheckErrors == 0 {
		b.WriteString("No errors were found on the image.\n")
	}
	if r.Corruptions > 0 {
		fmt.Fprintf(&b, "\n%d errors were found on the image.\n"+
			"Data may be corrupted, or further writes to the image may corrupt it.\n", r.Corruptions)
	}
	if r.Leaks > 0 {
		fmt.Fprintf(&b, "\n%d leaked clusters were found on the image.\n"+
			"This means waste of disk space, but no harm to data.\n", r.Leaks)
	}
	if r.CheckErrors > 0 {
		fmt.Fprintf(&b, "\n%d internal errors have occurred during the check.\n", r.CheckErrors)
	}
	if r.TotalClusters > 0 && r.AllocatedClusters > 0 {
		percent := func(n, of int64) float64 { return float64(n) * 100 / float64(of) }
		fmt.Fprintf(&b, "%d/%d = %.2f%% allocated, %.2f%% fragmented, %.2f%% compressed clusters\n",
			r.AllocatedClusters, r.TotalClusters, percent(r.AllocatedClusters, r.TotalClusters),
			percent(r.FragmentedClusters, r.AllocatedClusters), percent(r.CompressedClusters, r.AllocatedClusters))
	}
	if r.ImageEndOffset > 0 {
		fmt.Fprintf(&b, "Image end offset: %d\n", r.ImageEndOffset)
	}
	return b.String()
}

// An outputForm is what --output asks for.
type outputForm struct{ json bool }

func (f *outputForm) add(fs *pflag.FlagSet) {
	value(fs, "output", "", func(s string) error {
		if f.json = s == "json"; !f.json && s != "human" {
			return says("--output must be used with human or json as argument.")
		}
		return nil
	})
}

func oneImage(operands []string) (string, error) {
	if len(operands) != 1 {
		return "", &usage{text: "Expecting one image file name"}
	}
	return operands[0], nil
}
