package main

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// The two identities that the API server knows from its token file.
const (
	adminUser = "admin"
	// The bootstrap roles bind this user to system:node-proxier, the least that a service proxy needs.
	proxyUser = "system:kube-proxy"
)

// tokens are the bearer tokens of the identities above and the file, in kube-apiserver's format, that holds them.
type tokens struct {
	path  string
	admin string
	proxy string
}

// loadTokens reads the file, or writes it with new tokens where there is none: a restart keeps every client's credentials.
func loadTokens(path string) (tokens, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		text = fmt.Appendf(nil, "%s,%s,%s,system:masters\n%s,%s,%s\n",
			newToken(), adminUser, adminUser, newToken(), proxyUser, proxyUser)
		err = os.WriteFile(path, text, 0o600)
	}
	if err != nil {
		return tokens{}, fmt.Errorf("tokens of the API server: %w", err)
	}
	t := tokens{path: path}
	for line := range strings.Lines(string(text)) {
		fields := strings.Split(strings.TrimSpace(line), ",")
		if len(fields) < 2 {
			continue
		}
		switch fields[1] {
		case adminUser:
			t.admin = fields[0]
		case proxyUser:
			t.proxy = fields[0]
		}
	}
	if t.admin == "" || t.proxy == "" {
		return tokens{}, fmt.Errorf("tokens of the API server: %s lacks user %s or %s; remove it", path, adminUser, proxyUser)
	}
	return t, nil
}

func newToken() string {
	random := make([]byte, 16)
	// Never fails: crypto/rand.Read ends the program rather than return an error.
	rand.Read(random)
	return hex.EncodeToString(random)
}

func (a *apiServer) writeKubeconfigs(s settings) error {
	if err := a.writeKubeconfig(s.kubeconfig, adminUser, a.tokens.admin); err != nil {
		return err
	}
	return a.writeKubeconfig(s.proxyConfig, proxyUser, a.tokens.proxy)
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
