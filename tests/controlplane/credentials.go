package main

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// An identity that the API server knows from its token file.
type identity struct {
	user string
	// group is empty, or the one that the identity is in.
	group string
	// kubeconfig is the name of its kubeconfig, in the folder of the data.
	kubeconfig string
}

var (
	admin = identity{user: "admin", group: "system:masters", kubeconfig: "admin.kubeconfig"}
	// The bootstrap roles bind these users to what each of them needs and no more.
	identities = []identity{
		admin,
		{user: "system:kube-proxy", kubeconfig: "proxy.kubeconfig"},
		{user: "system:kube-controller-manager", kubeconfig: "controller-manager.kubeconfig"},
	}
)

// tokens are the bearer tokens of the identities by user and the file, in kube-apiserver's format, that holds them.
type tokens struct {
	path   string
	byUser map[string]string
}

// loadTokens reads the file, or writes it with new tokens where there is none: a restart keeps every client's credentials.
func loadTokens(path string) (tokens, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		for _, i := range identities {
			line := []string{newToken(), i.user, i.user}
			if i.group != "" {
				line = append(line, i.group)
			}
			text = fmt.Appendln(text, strings.Join(line, ","))
		}
		err = os.WriteFile(path, text, 0o600)
	}
	if err != nil {
		return tokens{}, fmt.Errorf("tokens of the API server: %w", err)
	}
	t := tokens{path: path, byUser: map[string]string{}}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Split(strings.TrimSpace(line), ","); len(fields) >= 2 {
			t.byUser[fields[1]] = fields[0]
		}
	}
	for _, i := range identities {
		if t.byUser[i.user] == "" {
			return tokens{}, fmt.Errorf("tokens of the API server: %s lacks user %s; remove it", path, i.user)
		}
	}
	return t, nil
}

func newToken() string {
	random := make([]byte, 16)
	// Never fails: crypto/rand.Read ends the program rather than return an error.
	rand.Read(random)
	return hex.EncodeToString(random)
}

func (a *apiServer) writeKubeconfigs(folder string) error {
	for _, i := range identities {
		if err := a.writeKubeconfig(filepath.Join(folder, i.kubeconfig), i.user, a.tokens.byUser[i.user]); err != nil {
			return err
		}
	}
	return nil
}

func (a *apiServer) writeKubeconfig(path, user, token string) error {
	ca, err := os.ReadFile(a.caFile)
	if err != nil {
		return fmt.Errorf("read the API server's certificate: %w", err)
	}
	config := clientcmdapi.NewConfig()
	config.Clusters["test"] = &clientcmdapi.Cluster{Server: a.url, CertificateAuthorityData: ca}
	config.AuthInfos[user] = &clientcmdapi.AuthInfo{Token: token}
	config.Contexts["test"] = &clientcmdapi.Context{Cluster: "test", AuthInfo: user}
	config.CurrentContext = "test"
	if err := clientcmd.WriteToFile(*config, path); err != nil {
		return fmt.Errorf("write kubeconfig %s: %w", path, err)
	}
	return nil
}
