package sandbox

import (
	"fmt"
	"os"
	"os/user"
	"strconv"
	"strings"
	"syscall"
)

// LookupUser finds out who NAME, NAME:GROUP, UID or UID:GID is. A user who has
// no name on this system and comes without a group is refused: nobody knows
// the group to give it.
func LookupUser(s string) (*User, error) {
	name, group, hasGroup := strings.Cut(s, ":")
	who, err := lookup(name)
	if err != nil {
		return nil, err
	}
	u := &User{Name: s, GID: -1}
	if u.UID, err = strconv.Atoi(who.Uid); err != nil {
		return nil, err
	}
	if hasGroup {
		if u.GID, err = lookupGroup(group); err != nil {
			return nil, err
		}
		return u, nil
	}
	if who.Gid == "" {
		return nil, fmt.Errorf("user %s has no entry in the list of users: give a group too, as in %s:%s", name, name, name)
	}
	if u.GID, err = strconv.Atoi(who.Gid); err != nil {
		return nil, err
	}
	groups, err := who.GroupIds()
	if err != nil {
		return nil, err
	}
	for _, g := range groups {
		gid, err := strconv.Atoi(g)
		if err != nil {
			return nil, err
		}
		u.Groups = append(u.Groups, gid)
	}
	return u, nil
}

// lookup finds a user by name, or by number, who need not be on the list.
func lookup(s string) (*user.User, error) {
	u, err := user.Lookup(s)
	if err == nil {
		return u, nil
	}
	if n, e := strconv.ParseUint(s, 10, 31); e == nil {
		if u, e := user.LookupId(s); e == nil {
			return u, nil
		}
		return &user.User{Uid: strconv.FormatUint(n, 10)}, nil
	}
	return nil, err
}

func lookupGroup(s string) (int, error) {
	g, err := user.LookupGroup(s)
	if err == nil {
		return strconv.Atoi(g.Gid)
	}
	if n, e := strconv.ParseUint(s, 10, 31); e == nil {
		return int(n), nil
	}
	return 0, err
}

// Become makes the process run as u, for good. Who is not root can only become
// who it is.
func Become(u *User) error {
	if os.Getuid() == u.UID && os.Geteuid() == u.UID && os.Getgid() == u.GID && os.Getegid() == u.GID && u.UID != 0 {
		return nil
	}
	failed := func(what string, err error) error {
		return fmt.Errorf("run as %s: %s: %w", u.Name, what, err)
	}
	if err := syscall.Setgroups(u.Groups); err != nil {
		return failed("groups", err)
	}
	if err := syscall.Setregid(u.GID, u.GID); err != nil {
		return failed("group", err)
	}
	if err := syscall.Setreuid(u.UID, u.UID); err != nil {
		return failed("user", err)
	}
	if u.UID != 0 && syscall.Setreuid(0, 0) == nil {
		return failed("user", fmt.Errorf("there is a way back"))
	}
	return nil
}
