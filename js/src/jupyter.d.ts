// The few names of JupyterLab that the extension uses. JupyterLab itself provides them at run time.

declare module "@lumino/widgets" {
  export class Widget {
    constructor();
    readonly node: HTMLElement;
    addClass(name: string): void;
    dispose(): void;
  }
}

declare module "@jupyterlab/apputils" {
  export interface ICommandPalette {
    addItem(options: { command: string; category: string }): void;
  }
  export const ICommandPalette: { readonly name: string };
}

declare module "*.css" {
  const text: string;
  export default text;
}
